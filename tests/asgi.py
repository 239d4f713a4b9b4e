"""Requests to an ASGI application by hand: bodies in pieces, clients that leave or do not read."""

import asyncio
from typing import Any


class Exchange:
    """One request, whose client does what a test says.

    Args:
        app: The application.
        method: Of the request.
        path: Of the request.
        headers: Of the request.
        root_path: Where a proxy shows the application.
    """

    def __init__(
        self, app: Any, method: str, path: str, headers: dict[str, str], *, root_path: str = ""
    ) -> None:
        self.app = app
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.can_send = asyncio.Event()
        self.can_send.set()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.is_complete = False
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": root_path,
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
            "client": ("10.0.0.1", 1234),
            "server": ("test", 80),
        }

    def start(self) -> None:
        """Hands the request to the application."""
        self._task = asyncio.create_task(
            self.app(self._scope, self._incoming.get, self._send)  # pyright: ignore
        )

    def feed(self, data: bytes, *, more: bool = False) -> None:
        """Sends a piece of the body."""
        self._incoming.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def leave(self) -> None:
        """The client closes the connection."""
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def ended(self) -> None:
        """Waits for the application to be done with the request."""
        assert self._task is not None
        await self._task

    async def until(self, condition: Any) -> None:
        """Waits until what was sent fulfils a condition."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def _send(self, message: dict[str, Any]) -> None:
        await self.can_send.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.is_complete = not message.get("more_body", False)
        self._changed.set()
