"""A host of rank above 0: makes the leader's calls on its own devices, in their order.

The main thread makes the calls; one thread reads them, so that the leader's end is noticed at once,
and one waits for the steps, so that their errors are.
"""

import dataclasses
import logging
import queue
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from jpaged.engine_config import EngineConfig
from jpaged.multihost import agreement, channel
from jpaged.multihost.location import Location, locate

if TYPE_CHECKING:
    from jpaged.device_worker import DeviceWorker

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 300
_RETRY_S = 0.2


def follow(config: EngineConfig) -> None:
    """Makes the leader's calls on this host until the leader ends.

    What cannot go on ends the process: exit code 1 if the leader is gone or has failed, 2 if this
    host has, 130 if it was interrupted.

    Raises:
        ValueError: This is the leader; the hosts do not agree.
        RuntimeError: The leader cannot be reached, or has failed before it had all hosts.
    """
    location = locate(config)
    if location.rank == 0:
        raise ValueError("node_rank must be above 0 to follow, got 0")
    following = _Following(config, location)
    try:
        following.run()
    except KeyboardInterrupt:
        agreement.end_process(130)
    except Exception as error:
        following.fail(error)


class _Following:
    """A connection to the leader, and what it asks for."""

    def __init__(self, config: EngineConfig, location: Location) -> None:
        self._location = location
        self._leader = f"the host of rank 0 ({location.leader}:{location.port})"
        self._connection = _connect(location)
        try:
            told = self._join(config)
        except BaseException:
            self._connection.close()
            raise
        self._config = dataclasses.replace(config, **told)
        agreement.prepare(self._connection)
        self._calls: queue.SimpleQueue[tuple[str, list[Any]]] = queue.SimpleQueue()
        self._steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._end: threading.Timer | None = None

    def _join(self, config: EngineConfig) -> dict[str, Any]:
        """What the leader tells of its config once all hosts are there."""
        facts = list(agreement.facts(config).items())
        self._connection.sendall(channel.encode("hello", self._location.rank, facts))
        # The others may take their time.
        self._connection.settimeout(JOIN_TIMEOUT_S)
        try:
            call, (told,) = channel.receive(self._connection)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"{self._leader} has not taken this one: {error}") from error
        if call == "failed":
            raise ValueError(told)
        return dict(told)

    def run(self) -> None:
        """Makes the calls until the last."""
        from jpaged.device_worker import DeviceWorker, load

        receiver = threading.Thread(target=self._receive, name="jpaged-hosts", daemon=True)
        watcher = threading.Thread(target=self._watch_steps, name="jpaged-hosts-wait", daemon=True)
        receiver.start()
        watcher.start()
        agreement.start_jax(self._location, self._config.nnodes)
        loaded, scheduler_config = load(self._config)
        worker = DeviceWorker(loaded, self._config, scheduler_config, exchange=self._exchange)
        logger.info("follows %s", self._leader)
        while True:
            call, args = self._calls.get()
            if call == "shutdown":
                break
            self._make(worker, call, args)
        self._steps.put(None)
        watcher.join()
        worker.shutdown()
        self._connection.sendall(channel.encode("ended"))
        agreement.stop_jax()
        self._connection.close()
        if self._end is not None:
            self._end.cancel()
        logger.info("the leader has ended")

    def fail(self, error: Exception) -> None:
        """Ends the process, and tells the leader why."""
        logger.critical(
            "%s", agreement.one_line(error), exc_info=logger.isEnabledFor(logging.DEBUG)
        )
        try:
            self._connection.sendall(channel.encode("failed", agreement.one_line(error)))
        except OSError:
            logger.debug("the leader does not hear it")
        agreement.end_process(2)

    def _make(self, worker: "DeviceWorker", call: str, args: list[Any]) -> None:
        match call, args:
            case "prepare", [name]:
                worker.prepare(worker.plan.step_program(name))
            case "run", [name, packed]:
                program = worker.plan.step_program(name)
                worker.prepare(program)
                self._steps.put(worker.run(program, packed)["tokens"])
            case "init_row", [row, num_prompt_tokens, only_listed, tokens, biased, biases]:
                worker.init_row(row, num_prompt_tokens, only_listed, tokens, biased, biases)
            case "set_masks", [rows, masks]:
                worker.set_masks(rows, masks)
            case "swap", [swap_outs, swap_ins]:
                worker.swap(swap_outs, swap_ins)
            case "reset", []:
                worker.reset()
            case _:
                raise RuntimeError(f"the leader asks for an unknown call {call!r}")

    def _exchange(self, name: str, value: Any) -> list[Any]:
        self._connection.sendall(channel.encode("figure", name, value))
        call, (found, values) = self._calls.get()
        assert (call, found) == ("figures", name), f"the leader tells {found} instead of {name}"
        return values

    def _receive(self) -> None:
        try:
            while True:
                call, args = channel.receive(self._connection)
                if call == "failed":
                    logger.critical("%s has ended with an error: %s", self._leader, args[0])
                    agreement.end_process(1)
                if call == "shutdown":
                    self._end = agreement.end_process_soon(agreement.END_TIMEOUT_S)
                self._calls.put((call, args))
                if call == "shutdown":
                    return
        except (OSError, ValueError):
            logger.critical("%s is gone; this one ends too", self._leader)
            agreement.end_process(1)

    def _watch_steps(self) -> None:
        while (tokens := self._steps.get()) is not None:
            try:
                tokens.block_until_ready()
            except Exception as error:
                self.fail(error)


def _connect(location: Location) -> socket.socket:
    """A connection to the leader, which may not be there yet."""
    deadline_s = time.monotonic() + JOIN_TIMEOUT_S
    logger.info("looking for the host of rank 0 at %s:%d", location.leader, location.port)
    while True:
        try:
            return socket.create_connection((location.leader, location.port), timeout=10)
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise RuntimeError(
                    f"there is no host of rank 0 at {location.leader}:{location.port} "
                    f"({error.strerror or error})"
                ) from error
        time.sleep(_RETRY_S)
