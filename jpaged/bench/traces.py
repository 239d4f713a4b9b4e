"""Recorded requests: when they came, how long they and their answers were, what they shared."""

import csv
import datetime
import gzip
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jpaged.bench.requests import BenchRequest, MadeUpPrompts

_ARRIVAL = ("arrival_s", "timestamp")
_INPUT = ("prompt_tokens", "input_length", "input_tokens", "request tokens", "contexttokens")
_OUTPUT = ("output_tokens", "output_length", "response tokens", "generatedtokens")
_BLOCK_SIZES = tuple(2**power for power in range(3, 13))

Row = Mapping[str, Any]


def trace_requests(path: str, count: int, prompts: MadeUpPrompts) -> list[BenchRequest]:
    """The first rows of a trace, in the order of their arrival, with made-up prompts.

    The file is CSV or JSON lines, gzipped or not. A row has the tokens of prompt and answer, and
    may have the time of arrival: `arrival_s` in seconds, or `timestamp` in milliseconds in JSON
    lines (as Mooncake's traces), in seconds or as a date in CSV (as BurstGPT's and Azure's).
    `hash_ids` name the blocks of a prompt: equal ids become equal text. Rows without prompt or
    answer are left out.

    Raises:
        ValueError: A column is missing, a value is unusable, or no row is left.
        OSError: The file cannot be read.
    """
    rows, is_json = _read(path)
    names = [_column(rows, columns, path) for columns in (_INPUT, _OUTPUT)]
    arrival = next((name for name in _ARRIVAL if name in rows[0]), None)
    found: list[tuple[float | None, int, int, Row]] = []
    for number, row in enumerate(rows, 1):
        try:
            num_input, num_output = (int(row[name]) for name in names)
            at = None if arrival is None else _seconds(row[arrival], arrival, is_json=is_json)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"row {number} of {path} is unusable: {error}") from None
        if num_input > 0 and num_output > 0:
            found.append((at, num_input, num_output, row))
    if not found:
        raise ValueError(f"dataset_path must hold a row with prompt and answer, got none in {path}")
    found.sort(key=lambda item: item[0] or 0.0)
    found = found[:count]
    block_size = _hash_block_size([(n, row.get("hash_ids")) for _, n, _, row in found], path)
    return [
        BenchRequest(
            _prompt(prompts, index, num_input, row.get("hash_ids"), block_size),
            num_output,
            num_input,
            at,
        )
        for index, (at, num_input, num_output, row) in enumerate(found)
    ]


def _read(path: str) -> tuple[list[Row], bool]:
    data = Path(path).read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    text = data.decode("utf-8-sig")
    is_json = text.lstrip().startswith("{")
    if is_json:
        try:
            rows: list[Any] = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path} is not JSON lines: {error}") from None
    else:
        rows = list(csv.DictReader(io.StringIO(text)))
    if not rows:
        raise ValueError(f"dataset_path must hold at least one row, got none in {path}")
    return [{str(name).strip().lower(): row[name] for name in row} for row in rows], is_json


def _column(rows: Sequence[Row], names: Sequence[str], path: str) -> str:
    for name in names:
        if name in rows[0]:
            return name
    raise ValueError(f"{path} must have one of the columns {', '.join(names)}")


def _seconds(value: Any, column: str, *, is_json: bool) -> float:
    if column == "timestamp" and is_json:
        return float(value) / 1000
    try:
        seconds = float(value)
    except ValueError:
        date = datetime.datetime.fromisoformat(str(value).strip())
        # Only differences count, and those must not jump with a clock's summer time.
        return date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp()
    if not math.isfinite(seconds):
        raise ValueError(f"{column} must be finite, got {value}")
    return seconds


def _hash_block_size(rows: Sequence[tuple[int, Any]], path: str) -> int:
    """Tokens that a hash id stands for: the size that explains how many ids each row has."""
    with_ids = [(num_input, len(ids)) for num_input, ids in rows if ids]
    for size in _BLOCK_SIZES:
        if all(-(-num_input // size) == num_ids for num_input, num_ids in with_ids):
            return size
    raise ValueError(f"hash_ids must stand for blocks of equal size, and in {path} they do not")


def _prompt(
    prompts: MadeUpPrompts, index: int, num_tokens: int, hash_ids: Any, block_size: int
) -> str | list[int]:
    if not hash_ids:
        return prompts.prompt([prompts.piece(index, num_tokens)])
    pieces = [prompts.piece(f"block {hash_id}", block_size) for hash_id in hash_ids]
    pieces[-1] = pieces[-1][: num_tokens - block_size * (len(pieces) - 1)]
    return prompts.prompt(pieces)
