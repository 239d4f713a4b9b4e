"""A small HTTP client for measurements: one request a connection, server-sent events one by one."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any


@dataclasses.dataclass(slots=True)
class Answer:
    """An answer whose body is still to be read."""

    status: int
    headers: dict[str, str]
    _reader: asyncio.StreamReader

    async def read(self) -> bytes:
        """The whole body."""
        if "content-length" in self.headers:
            return await self._reader.readexactly(int(self.headers["content-length"]))
        return b"".join([chunk async for chunk in self._chunks()])

    async def events(self) -> AsyncIterator[bytes]:
        """The data of each server-sent event."""
        rest = b""
        async for chunk in self._chunks():
            *whole, rest = (rest + chunk).split(b"\n\n")
            for event in whole:
                if event.startswith(b"data: "):
                    yield event[6:]

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self._reader.readline(), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)


@contextlib.asynccontextmanager
async def request(
    port: int, path: str, body: dict[str, Any] | None = None, method: str = "POST"
) -> AsyncIterator[Answer]:
    """Sends a request to this machine; leaving the block closes the connection.

    Raises:
        OSError: Nobody listens, or the connection broke.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
            + data
        )
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        yield Answer(status, headers, reader)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
