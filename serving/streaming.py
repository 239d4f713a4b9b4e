"""Server-sent events, by the letter, and requests that end when their client leaves.

A chunk is written as soon as it is there, all choices of an engine step in one write. Nothing is
built per token but the structs that say what is new.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Self, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jpaged.serving.answers import Usage
from jpaged.serving.errors import (
    ClientDisconnectedError,
    as_api_error,
    encode_error,
    error_response,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

_encode = msgspec.json.Encoder().encode


def event(data: bytes) -> bytes:
    """One event; `data` has no line ends, as JSON has none."""
    return b"data: " + data + b"\n\n"


class ChunkWriter:
    """Writes the chunks of one stream: what is the same in all is encoded once."""

    def __init__(self, head: dict[str, Any], *, with_usage: bool) -> None:
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        # OpenAI: with usage, every chunk has the field, all but the last as null.
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"

    def chunk(self, choice: msgspec.Struct, usage: Usage | None = None) -> bytes:
        """What is new of one choice."""
        if usage is None:
            return b"".join((self._head, _encode(choice), self._tail))
        return b"".join((self._head, _encode(choice), b'],"usage":', _encode(usage), b"}\n\n"))

    def last(self, usage: Usage) -> bytes:
        """The chunk of the usage, without choices."""
        return b"".join((self._head, b'],"usage":', _encode(usage), b"}\n\n"))


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client leaves.

    Raises:
        ClientDisconnectedError: The client left.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return task.result()
    finally:
        for each in (task, watcher):
            if not each.done():
                each.cancel()
                # Its own clean-up, such as the abort of a request, ends before this does.
                with contextlib.suppress(asyncio.CancelledError):
                    await each


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that sends what an iterator of encoded events yields.

    The status is decided by the first event: what goes wrong before it is a plain error answer,
    what goes wrong later is an event with the error.

    Args:
        events: Closed at the end, however it comes.
        keep_alive_s: Silence after which a comment is sent; 0: never.
        write_timeout_s: Longest time that a write may wait for the client.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        keep_alive_s: float,
        write_timeout_s: float,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream; ends early when the client leaves."""
        try:
            await while_connected(receive, self._run(scope, receive, send))
        finally:
            await self._events.aclose()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = asyncio.ensure_future(anext(self._events))
        try:
            # After a while of silence the client hears that its request lives, error or not.
            await asyncio.wait((first,), timeout=self._keep_alive_s or None)
            if first.done() and (error := first.exception()) is not None:
                await error_response(logged(error))(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with _Writer(send, self._keep_alive_s, self._write_timeout_s) as writer:
                await self._write_all(writer, first)
        finally:
            if not first.done():
                first.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await first

    async def _write_all(self, writer: "_Writer", first: asyncio.Future[bytes]) -> None:
        try:
            await writer.write(await first)
            async for chunk in self._events:
                await writer.write(chunk)
        except ClientDisconnectedError:
            raise
        except Exception as error:
            failure = event(encode_error(as_api_error(logged(error))))
            await writer.write(failure + DONE)
        await writer.end()


class _Writer:
    """Writes to one client; beside it a task that ends silence and writes that hang."""

    def __init__(self, send: Send, keep_alive_s: float, write_timeout_s: float) -> None:
        self._send = send
        self._keep_alive_s = keep_alive_s
        self._write_timeout_s = write_timeout_s
        self._last_s = time.monotonic()
        self._is_writing = False
        self._is_stuck = False

    async def __aenter__(self) -> Self:
        self._writer = asyncio.current_task()
        self._ticker = asyncio.ensure_future(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ticker.cancel()
        if self._is_stuck:
            raise ClientDisconnectedError

    async def write(self, data: bytes) -> None:
        self._last_s = time.monotonic()
        self._is_writing = True
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._is_writing = False

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tick(self) -> None:
        period_s = self._keep_alive_s or self._write_timeout_s
        while True:
            silence_s = time.monotonic() - self._last_s
            if self._is_writing and silence_s >= self._write_timeout_s:
                self._is_stuck = True
                assert self._writer is not None, "it was entered"
                self._writer.cancel()
                return
            if not self._is_writing and self._keep_alive_s and silence_s >= self._keep_alive_s:
                await self.write(KEEP_ALIVE)
                continue
            await asyncio.sleep(period_s - silence_s if silence_s < period_s else period_s)


def logged(error: BaseException) -> BaseException:
    """Puts an error that is our own into the log."""
    if as_api_error(error).status == 500:
        logger.error("a request failed", exc_info=error)
    return error
