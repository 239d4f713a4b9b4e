"""The leader's end: gathers the other hosts, tells them each call, notices when one is gone.

Calls go out through a thread a host, so that telling never waits. Nothing comes back while all is
well: results lie on every host, and the leader reads its own.
"""

import atexit
import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jpaged.engine_config import EngineConfig
from jpaged.multihost import agreement, channel
from jpaged.multihost.location import Location

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 300
"""How long the hosts may take to come."""
_HELLO_TIMEOUT_S = 10
_HELLO_BYTES = 1 << 20
_LAST_WORD_S = 2
_EXPLANATION_S = 2
_UNEQUAL = "a call that may have failed on some hosts has ended the engine"


class _Follower:
    """One of the other hosts."""

    def __init__(self, rank: int, connection: socket.socket, address: str) -> None:
        self.connection = connection
        self.name = f"the host of rank {rank} ({address})"
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.figures: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.ended = threading.Event()

        self.sender = threading.Thread(target=self._send, name="jpaged-hosts-send", daemon=True)
        self._receiver = threading.Thread(
            target=self._receive, name="jpaged-hosts-receive", daemon=True
        )
        self._on_lost: Callable[[_Follower, str], None] = lambda *_: None

    def start(self, on_lost: Callable[["_Follower", str], None]) -> None:
        """Begins to send and to receive; `on_lost` is told of the connection's end."""
        self._on_lost = on_lost
        self.sender.start()
        self._receiver.start()

    def _send(self) -> None:
        while (data := self.outbox.get()) is not None:
            try:
                self.connection.sendall(data)
            except OSError as error:
                self._on_lost(self, f"is gone ({error.strerror})")
                return

    def _receive(self) -> None:
        try:
            while True:
                call, args = channel.receive(self.connection)
                match call:
                    case "figure":
                        self.figures.put((args[0], args[1]))
                    case "failed":
                        self._on_lost(self, f"has ended with an error: {args[0]}")
                        return
                    case "ended":
                        self.ended.set()
                        return
        except (OSError, ValueError):
            self._on_lost(self, "is gone")
        finally:
            self.connection.close()


class Leader:
    """The other hosts, as rank 0 has them. Returns when all have come and agree.

    Once one is lost every method raises, and the process ends some seconds later, whatever it waits
    for: JAX does not give back a step whose other hosts are gone.

    Args:
        config: The engine's.
        location: Where to wait for the others.

    Raises:
        ValueError: A host has other options or versions; `master_addr` is no address of this host.
        RuntimeError: They have not all come in time.
    """

    def __init__(self, config: EngineConfig, location: Location) -> None:
        self._changed = threading.Condition()
        self._lost: str | None = None
        self._is_between = self._has_failed = False
        self._is_closed = False
        self._on_lost: Callable[[], None] = lambda: None
        self._followers = _gather(config, location)
        # Steps to wait for, by a thread: what waits for a device cannot be told of anything else.
        self._steps: queue.SimpleQueue[jax.Array | None] = queue.SimpleQueue()
        self._num_asked = self._num_ready = 0
        for follower in self._followers:
            follower.start(self._lose)
        self._waiter = threading.Thread(
            target=self._await_steps, name="jpaged-hosts-wait", daemon=True
        )
        self._waiter.start()
        atexit.register(self._at_exit)
        self._tell("welcome", list(agreement.shared_options(config).items()))
        logger.info("all %d hosts are here", config.nnodes)

    @property
    def is_lost(self) -> bool:
        """Whether one of the hosts is gone."""
        return self._lost is not None

    @property
    def _is_unequal(self) -> bool:
        """Whether hosts may not be where this one is: a call was cut short, or a step failed."""
        return self._is_between or self._has_failed

    def on_lost(self, wake: Callable[[], None]) -> None:
        """Has `wake` called, in some thread, when a host is gone."""
        self._on_lost = wake

    def check(self) -> None:
        """Raises `RuntimeError` if a host is gone, or hosts may not be where the others are."""
        if self._lost is not None:
            raise RuntimeError(self._lost)
        if self._is_unequal:
            raise RuntimeError(_UNEQUAL)

    def exchange(self, name: str, value: Any) -> list[Any]:
        """The figures of all hosts, by rank; see `DeviceWorker`."""
        values = [value]
        for follower in self._followers:
            values.append(self._figure(follower, name))
        self._tell("figures", name, values)
        return values

    def _figure(self, follower: _Follower, name: str) -> Any:
        while True:
            self.check()
            with contextlib.suppress(queue.Empty):
                found, value = follower.figures.get(timeout=0.1)
                assert found == name, f"{follower.name} tells {found} instead of {name}"
                return value

    def tell(self, call: str, *args: Any) -> None:
        """Has the other hosts make a call that need not be made here."""
        self.check()
        self._tell(call, *args)

    @contextlib.contextmanager
    def together(self, call: str, *args: Any) -> Iterator[None]:
        """Has the other hosts make the call that is made within; if that fails, nothing goes on."""
        self.check()
        self._is_between = True
        self._tell(call, *args)
        try:
            yield
        except Exception:
            self._explain()
            raise
        self._is_between = False

    def wait(self, array: jax.Array) -> None:
        """Returns when an array is there.

        Raises:
            RuntimeError: A host is gone, without which it may never be.
        """
        with self._changed:
            self._num_asked += 1
            number = self._num_asked
            self._steps.put(array)
            self._changed.wait_for(lambda: self._num_ready >= number or self._lost is not None)
        if self._has_failed:
            self._explain()
            return  # whoever reads the step meets its error
        self.check()

    def _explain(self) -> None:
        """Raises if a host is gone; a step may have failed of it before that is known."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None, _EXPLANATION_S)
        if self._lost is not None:
            raise RuntimeError(self._lost)

    def close(self, error: BaseException | None = None) -> None:
        """Ends the other hosts and waits until they have; only the first call does anything.

        Args:
            error: Why, if the engine could not even start.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if error is not None:
            self._end("failed", agreement.one_line(error))
            atexit.unregister(self._at_exit)
            return
        if self._lost is not None or self._is_unequal:
            self._end("failed", self._lost or _UNEQUAL)
            agreement.end_process_soon()
            return
        self._end("shutdown")
        ends_s = time.monotonic() + agreement.END_TIMEOUT_S
        late = [f for f in self._followers if not f.ended.wait(max(0, ends_s - time.monotonic()))]
        if late and self._lost is None:
            self._lost = f"{late[0].name} does not end"
        if self._lost is not None:
            logger.warning("%s", self._lost)
            return
        self._steps.put(None)
        self._waiter.join()
        agreement.stop_jax()
        atexit.unregister(self._at_exit)

    def _end(self, call: str, *args: Any) -> None:
        """Tells the last call; the process may end right after."""
        self._tell(call, *args)
        for follower in self._followers:
            follower.outbox.put(None)
        for follower in self._followers:
            follower.sender.join(_LAST_WORD_S)

    def _tell(self, call: str, *args: Any) -> None:
        data = channel.encode(call, *args)
        for follower in self._followers:
            follower.outbox.put(data)

    def _lose(self, follower: _Follower, what: str) -> None:
        with self._changed:
            follower.ended.set()
            if self._lost is not None:
                return
            self._lost = f"{follower.name} {what}"
            self._changed.notify_all()
            if self._is_closed:
                return
        logger.critical("%s; this one ends too", self._lost)
        agreement.end_process_soon()
        self._on_lost()

    def _await_steps(self) -> None:
        while True:
            array = self._steps.get()
            if array is None:
                return
            try:
                array.block_until_ready()
            except Exception:
                self._has_failed = True
            with self._changed:
                self._num_ready += 1
                self._changed.notify_all()

    def _at_exit(self) -> None:
        self.close()
        if self._lost is not None or self._is_unequal:
            agreement.end_process(1)


def _gather(config: EngineConfig, location: Location) -> list[_Follower]:
    """The other hosts by rank, once all have come and said what they were given."""
    deadline_s = time.monotonic() + JOIN_TIMEOUT_S
    found: dict[int, _Follower] = {}
    with _listen(location) as listener:
        logger.info(
            "waiting for %d hosts at %s:%d", config.nnodes - 1, location.leader, location.port
        )
        try:
            while len(found) < config.nnodes - 1:
                listener.settimeout(max(0.001, deadline_s - time.monotonic()))
                _welcome(*listener.accept(), config, found)
        except TimeoutError:
            missing = sorted(set(range(1, config.nnodes)) - found.keys())
            error = RuntimeError(
                f"nnodes={config.nnodes}, but the hosts of ranks {missing} have not come to "
                f"{location.leader}:{location.port} within {JOIN_TIMEOUT_S} s"
            )
            _refuse(found, error)
            raise error from None
        except ValueError as error:
            _refuse(found, error)
            raise
    return [found[rank] for rank in sorted(found)]


def _listen(location: Location) -> socket.socket:
    family = socket.AF_INET6 if ":" in location.leader else socket.AF_INET
    try:
        return socket.create_server((location.leader, location.port), family=family)
    except OSError as error:
        raise ValueError(
            f"master_addr and master_port must be an address of the host of rank 0 and a free "
            f"port, got {location.leader}:{location.port} ({error.strerror})"
        ) from error


def _welcome(
    connection: socket.socket, address: Any, config: EngineConfig, found: dict[int, _Follower]
) -> None:
    """Takes a host among the others; who does not speak as one is sent away."""
    connection.settimeout(_HELLO_TIMEOUT_S)
    try:
        call, (rank, facts) = channel.receive(connection, _HELLO_BYTES)
        if call != "hello" or not isinstance(rank, int) or not isinstance(facts, list):
            raise ValueError(call)
        told = dict(facts)
    except (OSError, ValueError, TypeError):
        logger.warning("a connection from %s is not one of a host", address[0])
        connection.close()
        return
    reason = agreement.difference(agreement.facts(config), told, rank)
    if reason is None and rank in found:
        reason = f"node_rank must differ on all hosts, got {rank} twice"
    if reason is not None:
        with contextlib.suppress(OSError):
            connection.sendall(channel.encode("failed", reason))
        connection.close()
        raise ValueError(reason)
    agreement.prepare(connection)
    found[rank] = _Follower(rank, connection, address[0])


def _refuse(found: dict[int, _Follower], error: BaseException) -> None:
    for follower in found.values():
        with contextlib.suppress(OSError):
            follower.connection.sendall(channel.encode("failed", agreement.one_line(error)))
        follower.connection.close()
