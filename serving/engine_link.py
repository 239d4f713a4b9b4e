"""Starts the engine's process and carries messages between it and an event loop.

The sockets lie in a directory that only this user can enter, and that is gone as soon as both are
connected: whatever happens later leaves no file behind. No message waits for the loop to do
anything else: they are read in it, all that are there at once.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

import zmq

from jpaged.serving import messages
from jpaged.serving.engine_channel import FROM_ENGINE, TO_ENGINE, open_socket

logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-P", "-m", "jpaged.serving.engine_process")
_STOP_TIMEOUT_S = 10.0
_MAX_MESSAGES_AT_ONCE = 64
"""Then other callbacks of the loop have their turn."""


class EngineLink:
    """A process with an engine, as one event loop sees it.

    Args:
        on_message: Called in the loop with each message after `Connected`.
        on_exit: Called once, in the loop, after the last message, with the exit code of a process
            that has ended; negative for a signal.
        command: What to start; the directory of the sockets is added to it.
    """

    def __init__(
        self,
        on_message: Callable[[messages.FromEngine], None],
        on_exit: Callable[[int], None],
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._on_message = on_message
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._directory: str | None = tempfile.mkdtemp(prefix="jpaged-")  # of mode 0700
        self._receiver = open_socket(self._context, zmq.PULL)
        self._receiver.bind(f"ipc://{self._directory}/{FROM_ENGINE}")
        self._sender = open_socket(self._context, zmq.PUSH)
        self._sender.connect(f"ipc://{self._directory}/{TO_ENGINE}")
        self._readable = self._receiver.fileno()
        self._process = self._start(command)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._ended = asyncio.Event()
        self._is_open = True
        self._loop.add_reader(self._pidfd, self._read_exit)
        self._loop.add_reader(self._readable, self._read)
        self._read()  # what came before the reader was there is not signalled again

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, message: messages.ToEngine) -> None:
        """Sends a message; does not wait. One for a process that has ended is dropped."""
        if self._is_open:
            self._sender.send(messages.encode(message))

    async def close(self) -> None:
        """Ends the process, by force if it does not end when told to, and the sockets."""
        self.send(messages.Stop())
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._ended.wait()
        except TimeoutError:
            logger.warning("the engine's process does not end and is killed")
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends the process and the sockets at once."""
        if self._is_open:
            self._process.kill()
            self._finish(self._process.wait())

    def _start(self, command: Sequence[str]) -> "subprocess.Popen[bytes]":
        assert self._directory is not None
        # The process ends when its standard input does: nobody else may hold the other end.
        return subprocess.Popen(
            [*command, self._directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # Ctrl-C in a terminal is for this process to handle
        )

    def _read(self) -> None:
        """Reads what is there; the file descriptor tells of news only once."""
        for _ in range(_MAX_MESSAGES_AT_ONCE):
            if not self._is_open:
                return
            try:
                frame = self._receiver.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = messages.decode_from_engine(frame)
            if isinstance(message, messages.Connected):
                self._remove_directory()
            else:
                self._on_message(message)
        self._loop.call_soon(self._read)

    def _read_exit(self) -> None:
        code = self._process.wait()
        while self._receiver.poll(0):
            self._read()
        self._finish(code)

    def _finish(self, code: int) -> None:
        self._is_open = False
        self._loop.remove_reader(self._readable)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._context.destroy(linger=0)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._remove_directory()
        self._ended.set()
        self._on_exit(code)

    def _remove_directory(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
