"""The sockets between the two processes: how they are opened, and the engine's end of them."""

import contextlib
import os

import zmq

from jpaged.serving import messages

FROM_ENGINE, TO_ENGINE = "from-engine", "to-engine"
"""Names of the two sockets in the directory that the processes share at the start."""


def open_socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int) -> "zmq.Socket[bytes]":
    """A socket that never drops a message: what waits is bounded by the requests that run.

    Who sends connects and who receives binds, so that sending never waits either.
    """
    socket = context.socket(kind)
    socket.set_hwm(0)
    return socket


class Channel:
    """The engine's end of the sockets; `wake` may be called from any thread."""

    def __init__(self, directory: str) -> None:
        self._context = zmq.Context()
        self._receiver = open_socket(self._context, zmq.PULL)
        self._receiver.bind(f"ipc://{directory}/{TO_ENGINE}")
        self._sender = open_socket(self._context, zmq.PUSH)
        self._sender.connect(f"ipc://{directory}/{FROM_ENGINE}")
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        self._poller.register(self._receiver, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)

    def receive(self, *, wait: bool) -> list[messages.ToEngine]:
        """All messages that are there; if it is to wait, at least one unless woken."""
        if wait:
            self._poller.poll()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        found = []
        while True:
            try:
                found.append(messages.decode_to_engine(self._receiver.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return found

    def send(self, message: messages.FromEngine) -> None:
        """Sends a message; does not wait."""
        self._sender.send(messages.encode(message))

    def wake(self) -> None:
        """Ends the wait of `receive`, or the next one."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Ends the sockets once all is sent, or after a second."""
        self._context.destroy(linger=1000)
