"""An application on a real uvicorn at 127.0.0.1, in a thread with an event loop of its own."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import uvicorn

STARTED_S = 60  # never waited for unless a test fails


@contextlib.contextmanager
def serving(
    make_app: Callable[[], AbstractAsyncContextManager[Any]], **options: Any
) -> Iterator[str]:
    """The server's URL while the context lasts.

    Args:
        make_app: Gives the application, within the server's event loop.
        **options: Of uvicorn.
    """
    server = _Server()
    started: list[BaseException | int] = []
    ready = threading.Event()

    async def run() -> None:
        try:
            async with make_app() as app:
                config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, **options)
                await server.run(config, started, ready)
        except BaseException as error:
            started.append(error)
            ready.set()
            raise

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert ready.wait(STARTED_S)
    (first, *_) = started
    if isinstance(first, BaseException):
        raise first
    try:
        yield f"http://127.0.0.1:{first}"
    finally:
        server.stop()
        thread.join()


class _Server:
    def __init__(self) -> None:
        self._server: uvicorn.Server | None = None

    async def run(self, config: uvicorn.Config, started: list[Any], ready: threading.Event) -> None:
        class Telling(uvicorn.Server):
            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets)
                started.append(self.servers[0].sockets[0].getsockname()[1])
                ready.set()

        self._server = Telling(config)
        await self._server.serve()

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True


@contextlib.asynccontextmanager
async def just(app: Any) -> AsyncIterator[Any]:
    """An application that needs no event loop to be made."""
    yield app
