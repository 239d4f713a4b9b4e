"""`jpaged serve`: the engine's process, the HTTP server in this one, and how both end.

Exit codes: 0 it was told to stop; 1 the engine died. What is wrong with options or model is raised
before anything is served.
"""

import asyncio
import contextlib
import logging
import math
import signal
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import uvicorn
import uvloop

from jpaged.serving.app import create_app
from jpaged.serving.engine_client import EngineProcessClient
from jpaged.serving.engine_link import ENGINE_COMMAND
from jpaged.serving.http_protocol import with_head_timeout
from jpaged.serving.logs import READY, logging_to_stderr
from jpaged.serving.settings import ServerSettings

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DEATH_GRACE_S = 1.0
"""How long a server whose engine died still answers, so that clients and probes hear of it."""
_WRITE_GRACE_S = 5
"""How long the ends of aborted answers may take to be read."""


def run_server(
    engine_options: Mapping[str, Any],
    settings: ServerSettings,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
) -> int:
    """Serves until told to stop and returns the exit code.

    SIGTERM and SIGINT stop it: no new requests, open ones go on for
    `settings.shutdown_timeout_s` and are aborted then. A second signal ends it at once.

    Args:
        engine_options: Of `EngineConfig`.
        settings: Of the server.
        engine_command: The program that is the engine.

    Raises:
        ValueError: An option is wrong, or the model cannot be loaded; one line.
        OSError: The address is not to be had.
    """
    with (
        logging_to_stderr(settings.log_level, settings.log_format),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_Serving(settings, engine_command).run(engine_options))


class _Serving:
    """One run of the server."""

    def __init__(self, settings: ServerSettings, engine_command: Sequence[str]) -> None:
        self._settings = settings
        self._engine_command = engine_command
        self._stopping = asyncio.Event()
        self._server: _Server | None = None

    async def run(self, engine_options: Mapping[str, Any]) -> int:
        started_s = time.monotonic()
        _check_certificate(self._settings)
        with self._signals(), contextlib.closing(_bind(self._settings)) as listener:
            engine = await self._start_engine(engine_options)
            if engine is None:
                return 0
            try:
                return await self._serve(engine, listener, started_s)
            finally:
                await engine.shutdown()

    async def _start_engine(self, options: Mapping[str, Any]) -> EngineProcessClient | None:
        """The engine, or None if it is told to stop meanwhile."""
        settings = self._settings
        starting = asyncio.create_task(
            EngineProcessClient.start(
                options,
                command=self._engine_command,
                max_num_queued_reqs=settings.max_num_queued_reqs,
                max_num_queued_tokens=settings.max_num_queued_tokens,
                log_level=settings.log_level,
                log_format=settings.log_format,
            )
        )
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if starting.done():
            return starting.result()
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return None

    async def _serve(
        self, engine: EngineProcessClient, listener: "_Listener", started_s: float
    ) -> int:
        settings = self._settings
        config = uvicorn.Config(
            create_app(engine, settings),
            http=with_head_timeout(settings.body_timeout_s),
            ws="none",
            log_config=None,
            log_level=settings.log_level,
            access_log=not settings.disable_access_log,
            server_header=False,
            root_path=settings.root_path,
            uds=settings.uds,
            ssl_keyfile=settings.ssl_keyfile,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile_password=settings.ssl_keyfile_password,
            ssl_ca_certs=settings.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_REQUIRED if settings.ssl_ca_certs else ssl.CERT_NONE,
            ssl_ciphers=settings.ssl_ciphers,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout_s) + _WRITE_GRACE_S,
        )
        self._server = server = _Server(config, engine, settings.shutdown_timeout_s)
        server.ready_line = (
            f"{engine.info.model} is ready at {listener.url} "
            f"after {time.monotonic() - started_s:.1f} s"
        )
        if self._stopping.is_set():
            return 0
        dying = asyncio.create_task(_stop_after_death(engine, server))
        try:
            await server.serve(sockets=listener.sockets)
            return 1 if dying.done() else 0
        finally:
            dying.cancel()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if self._server is not None:
            if self._stopping.is_set():
                self._server.force()
            self._server.should_exit = True
        self._stopping.set()


class _Server(uvicorn.Server):
    """uvicorn's server; signals are not its own, and it ends with the engine's requests."""

    def __init__(
        self, config: uvicorn.Config, engine: EngineProcessClient, shutdown_timeout_s: float
    ) -> None:
        super().__init__(config)
        self.ready_line = ""
        self._engine = engine
        self._shutdown_timeout_s = shutdown_timeout_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            logger.log(READY, self.ready_line)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._engine.shutdown(self._shutdown_timeout_s))
        await super().shutdown(sockets)
        await draining

    def force(self) -> None:
        """Ends it without waiting for anybody."""
        self.force_exit = True
        self._engine.kill()


async def _stop_after_death(engine: EngineProcessClient, server: uvicorn.Server) -> None:
    reason = await engine.wait_dead()
    logger.critical("%s; the server ends", reason)
    await asyncio.sleep(_DEATH_GRACE_S)
    server.should_exit = True


class _Listener:
    """The address, taken before the engine starts: a port in use is told at once.

    Nothing can connect before uvicorn listens. A Unix socket is uvicorn's to make.
    """

    def __init__(self, sockets: list[socket.socket] | None, url: str) -> None:
        self.sockets = sockets
        self.url = url

    def close(self) -> None:
        for found in self.sockets or ():
            found.close()


def _bind(settings: ServerSettings) -> _Listener:
    if settings.uds is not None:
        return _Listener(None, f"unix:{settings.uds}")
    host = settings.host or "0.0.0.0"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{settings.port}: {error.strerror}") from error
    shown = f"[{host}]" if ":" in host else host
    scheme = "https" if settings.is_tls else "http"
    return _Listener([found], f"{scheme}://{shown}:{found.getsockname()[1]}")


def _check_certificate(settings: ServerSettings) -> None:
    """Raises `ValueError` before the engine starts where TLS could not be served."""
    if settings.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(
            settings.ssl_certfile, settings.ssl_keyfile, lambda: settings.ssl_keyfile_password or ""
        )
        if settings.ssl_ca_certs:
            context.load_verify_locations(settings.ssl_ca_certs)
        if settings.ssl_ciphers:
            context.set_ciphers(settings.ssl_ciphers)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"ssl_certfile and the other TLS options do not fit: {error}") from error
