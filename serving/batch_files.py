"""Files of a batch: lines in OpenAI's format in, results out, and where an earlier run stopped.

A result is one line, written at once. Whatever kills a run can tear the last line only; the next
run cuts that off and goes on after it.
"""

import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

URLS = ("/v1/completions", "/v1/chat/completions")
_FIELDS = ("custom_id", "method", "url", "body")


@dataclasses.dataclass(frozen=True, slots=True)
class BatchLine:
    """A request of the input.

    Attributes:
        number: Of its line, from 1.
        custom_id: The user's name for it.
        url: The route it goes to.
        body: What is sent there.
        fault: What is wrong with the line, if anything is; then it is not sent.
    """

    number: int
    custom_id: str | None = None
    url: str = ""
    body: dict[str, Any] = dataclasses.field(default_factory=dict)
    fault: str | None = None


def read_lines(path: str) -> list[BatchLine]:
    """The requests of a file, or of standard input for `-`; a bad line costs only itself.

    Raises:
        ValueError: There is no request in it, or it is not a file of this machine.
        OSError: It cannot be read.
    """
    if "://" in path:
        raise ValueError(f"--input-file must be a file of this machine, got {path}")
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    lines: list[BatchLine] = []
    first_at: dict[str, int] = {}
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        line = _parse(number, raw)
        if line.fault is None and line.custom_id is not None:
            first = first_at.setdefault(line.custom_id, number)
            if first != number:
                fault = f"custom_id must be unique, and line {first} has the same"
                line = dataclasses.replace(line, fault=fault)
        lines.append(line)
    if not lines:
        raise ValueError(f"--input-file must hold at least one request, got none in {path}")
    return lines


def _parse(number: int, raw: bytes) -> BatchLine:
    try:
        line = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return BatchLine(number, fault=f"the line is not UTF-8: byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BatchLine(number, fault=f"the line is not JSON: {error}")
    if not isinstance(line, dict):
        return BatchLine(number, fault="the line must hold a JSON object")
    custom_id, body = line.get("custom_id"), line.get("body")
    known_id = custom_id if isinstance(custom_id, str) and custom_id else None
    fault = None
    if unknown := [name for name in line if name not in _FIELDS]:
        fault = f"{unknown[0][:40]!r} is not supported: a line has {', '.join(_FIELDS)}"
    elif known_id is None:
        fault = "custom_id must be a non-empty string"
    elif line.get("method") != "POST":
        fault = 'method must be "POST"'
    elif line.get("url") not in URLS:
        fault = f"url must be one of {', '.join(URLS)}"
    elif not isinstance(body, dict):
        fault = "body must be a JSON object"
    elif body.get("stream"):
        fault = "body.stream must be false in a batch"
    if fault is not None or not isinstance(body, dict):
        return BatchLine(number, known_id, fault=fault)
    return BatchLine(number, known_id, line["url"], body)


class BatchOutput:
    """Where results go: a file that an earlier run may have begun, or standard output for `-`.

    Use it as a context; nobody else can write to the file within it.

    Args:
        path: Of the file.

    Attributes:
        custom_ids: Requests whose results it has already.
        faulty_lines: Numbers of the bad lines it has already told of.
        num_failed: How many of all these went wrong.

    Raises:
        ValueError: The file holds something else than results, or another run writes to it.
        OSError: It cannot be read or written.
    """

    def __init__(self, path: str) -> None:
        self.custom_ids: set[str] = set()
        self.faulty_lines: set[int] = set()
        self.num_failed = 0
        if path == "-":
            self._file: BinaryIO = sys.stdout.buffer
            return
        self._file = Path(path).open("a+b")  # noqa: SIM115  # this object is the context
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another run writes to --output-file {path}") from None
        try:
            self._take_over(path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not sys.stdout.buffer:
            self._file.close()

    def write(self, result: dict[str, Any]) -> None:
        """Appends a result and hands it to the operating system."""
        self._file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def has(self, line: BatchLine) -> bool:
        """Whether there is a result of this line already."""
        if line.fault is not None:
            return line.number in self.faulty_lines
        return line.custom_id in self.custom_ids

    def _take_over(self, path: str) -> None:
        """Reads what is there, and cuts off a torn last line."""
        self._file.seek(0)
        end = 0
        for number, raw in enumerate(self._file, 1):
            if not raw.endswith(b"\n"):
                break
            result = _result(raw)
            if result is None:
                raise ValueError(f"line {number} of --output-file {path} is no result of a batch")
            end += len(raw)
            self._note(result)
        os.truncate(self._file.fileno(), end)

    def _note(self, result: dict[str, Any]) -> None:
        response, error = result["response"], result["error"]
        if response is None:
            self.faulty_lines.add(error["line"])
        else:
            self.custom_ids.add(result["custom_id"])
        self.num_failed += is_failure(result)


def is_failure(result: dict[str, Any]) -> bool:
    """Whether a result is not what was asked for."""
    return result["response"] is None or result["response"]["status_code"] != 200


def unknown_ids(output: BatchOutput, lines: list[BatchLine]) -> Iterator[str]:
    """Ids that an output has results of and the input does not hold."""
    known = {line.custom_id for line in lines}
    return (custom_id for custom_id in sorted(output.custom_ids) if custom_id not in known)


def _result(raw: bytes) -> dict[str, Any] | None:
    """A line of the output if it is one of ours."""
    try:
        result = json.loads(raw)
        response, error = result["response"], result["error"]
        if response is None:
            is_ours = isinstance(error["line"], int)
        else:
            is_ours = isinstance(result["custom_id"], str) and isinstance(
                response["status_code"], int
            )
    except (ValueError, KeyError, TypeError):
        return None
    return result if is_ours else None
