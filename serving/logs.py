"""Logs of a server: one line an event, as text or JSON, with the request's id where there is one.

Whatever happens to what is written to, a full disk or a reader that does not read, the server goes
on: lines are written by a thread of their own, and those that cannot be written are counted and
left out. No prompt's text is ever logged here.
"""

import contextlib
import contextvars
import json
import logging
import logging.handlers
import os
import queue
import sys
import time
from collections.abc import Iterator
from typing import Literal

LogFormat = Literal["text", "json"]

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
"""Of the request that the current task works for; set by whoever accepts it."""

READY = logging.CRITICAL + 10
"""Level of the line that says that the server is ready: it comes whatever the log level."""
logging.addLevelName(READY, "READY")

_MAX_WAITING = 10_000
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160))}
_TRACE = 5
"""uvicorn's level below DEBUG."""


class _Lines(logging.Handler):
    """Writes to a file descriptor, around all buffers: what fails is lost and holds up nothing."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.num_lost = 0
        self._descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = (self.format(record) + "\n").encode(errors="replace")
            while line:
                line = line[os.write(self._descriptor, line) :]
        except Exception:  # a disk that is full, a format that does not fit: a log may not fail
            self.num_lost += 1


class _Waiting(logging.handlers.QueueHandler):
    """Notes the request's id, and hands a line to the thread that writes; never waits."""

    def __init__(self, lines: "queue.Queue[logging.LogRecord]", writer: _Lines) -> None:
        super().__init__(lines)
        self._writer = writer

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.request_id = request_id.get()
        # Now: its arguments may change. A message is a line, whatever a client has put in it.
        record.message = record.getMessage().translate(_ESCAPES)
        record.msg, record.args = record.message, None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self._writer.num_lost += 1


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-8s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        found = getattr(record, "request_id", None)
        return text if found is None or found in text else f"{text} [{found}]"


class _JsonFormatter(logging.Formatter):
    converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (found := getattr(record, "request_id", None)) is not None:
            fields["request_id"] = found
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


@contextlib.contextmanager
def logging_to_stderr(level: str = "info", form: LogFormat = "text") -> Iterator[_Lines]:
    """All logs of this process go to standard error, until the end of the block.

    Args:
        level: The least serious one, by uvicorn's names.
        form: "text", or "json" for one object a line.
    """
    number = _TRACE if level == "trace" else logging.getLevelName(level.upper())
    writer = _Lines(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2)
    writer.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_MAX_WAITING)
    handler = _Waiting(lines, writer)
    listener = logging.handlers.QueueListener(lines, writer)
    root = logging.getLogger()
    old_handlers, old_level = root.handlers, root.level
    root.handlers = [handler]
    root.setLevel(number)
    # Of JAX's and others' lines only what is wrong.
    for name in ("jax", "jaxlib", "orbax", "asyncio", "httpx", "urllib3"):
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    listener.start()
    try:
        yield writer
    finally:
        root.handlers = old_handlers
        root.setLevel(old_level)
        listener.stop()
