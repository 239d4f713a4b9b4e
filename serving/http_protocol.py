"""uvicorn's HTTP protocol with bounds on what comes before a request: its line and headers.

uvicorn waits for these without end, and keeps them however many they are. The body has bounds of
its own (`request_body`).
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
_PHRASES = {408: b"408 Request Timeout", 431: b"431 Request Header Fields Too Large"}


class BoundedHeadProtocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        head_timeout_s: How long the head of a request may take to come; see `with_head_timeout`.
    """

    head_timeout_s = 60.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A client has come; its first request may take its time."""
        self._timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The first byte of a request has come."""
        super().on_message_begin()
        self._begin_head()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._end_head()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Reads on; a head that is still not complete may have become too long."""
        super().data_received(data)
        if self._timer is not None:
            self._num_bytes += len(data)
            if self._num_bytes > MAX_HEAD_BYTES:
                self._refuse(431)

    def _begin_head(self) -> None:
        self._end_head()
        self._num_bytes = 0
        self._timer = self.loop.call_later(self.head_timeout_s, self._refuse, 408)

    def _end_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int) -> None:
        self._end_head()
        if self.transport.is_closing():
            return
        if self._num_bytes:  # who has said nothing is told nothing
            self.transport.write(
                b"HTTP/1.1 %b\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % _PHRASES[status]
            )
        self.transport.close()


def with_head_timeout(seconds: float) -> type[BoundedHeadProtocol]:
    """The protocol with another time limit."""
    return type("Protocol", (BoundedHeadProtocol,), {"head_timeout_s": seconds})
