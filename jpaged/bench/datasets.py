"""Requests of a benchmark: drawn lengths, a file of prompts, ShareGPT conversations."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from jpaged.bench.requests import BenchRequest, MadeUpPrompts

CountTokens = Callable[[list[str]], Awaitable[list[int]]]
"""How many tokens each text has."""


def random_requests(
    count: int,
    prompts: MadeUpPrompts,
    rng: np.random.Generator,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
) -> list[BenchRequest]:
    """Prompts of made-up text, all beginning with the same `prefix_len` tokens.

    Lengths are uniform between `(1 - range_ratio)` and `(1 + range_ratio)` times those given; the
    prefix comes on top.

    Raises:
        ValueError: A number is out of range.
    """
    for name, value, least in (
        ("random_input_len", input_len, 1),
        ("random_output_len", output_len, 1),
        ("random_prefix_len", prefix_len, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= range_ratio < 1:
        raise ValueError(f"random_range_ratio must be in [0, 1), got {range_ratio}")
    inputs = _lengths(count, input_len, range_ratio, rng)
    outputs = _lengths(count, output_len, range_ratio, rng)
    prefix = prompts.piece("prefix", prefix_len)
    return [
        BenchRequest(
            prompts.prompt([prefix, prompts.piece(index, num_input)]),
            num_output,
            prompt_tokens=prefix_len + num_input,
        )
        for index, (num_input, num_output) in enumerate(zip(inputs, outputs, strict=True))
    ]


def _lengths(count: int, middle: int, ratio: float, rng: np.random.Generator) -> list[int]:
    low, high = max(int(middle * (1 - ratio)), 1), int(np.ceil(middle * (1 + ratio)))
    return rng.integers(low, high, size=count, endpoint=True).tolist()


def custom_requests(path: str, count: int, output_len: int) -> list[BenchRequest]:
    """The first rows of a file of JSON lines, from the beginning again if there are too few.

    A row holds "prompt" (text or token ids) or "messages", and may hold "output_tokens".

    Raises:
        ValueError: A row is unusable, or there is none.
        OSError: The file cannot be read.
    """
    if output_len < 1:
        raise ValueError(f"custom_output_len must be at least 1, got {output_len}")
    rows = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(rows) == count:
                break
            if line.strip():
                rows.append(_custom_row(line, f"line {number} of {path}", output_len))
    if not rows:
        raise ValueError(f"dataset_path must hold at least one row, got none in {path}")
    return [rows[index % len(rows)] for index in range(count)]


def _custom_row(line: str, where: str, output_len: int) -> BenchRequest:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} must hold a JSON object, got {line.strip()[:40]!r}")
    prompt = row.get("messages", row.get("prompt"))
    if not isinstance(prompt, str | list) or not prompt:
        raise ValueError(f"{where} must have a non-empty prompt or messages, got {prompt!r}")
    max_tokens = row.get("output_tokens", output_len)
    if type(max_tokens) is not int or max_tokens < 1:
        raise ValueError(f"{where}: output_tokens must be an integer >= 1, got {max_tokens!r}")
    return BenchRequest(prompt, max_tokens)


async def sharegpt_requests(
    path: str,
    count: int,
    rng: np.random.Generator,
    count_tokens: CountTokens,
    output_len: int | None = None,
) -> list[BenchRequest]:
    """First exchanges of conversations in ShareGPT's format, in random order.

    Those with fewer than 4 tokens in prompt or answer, more than 1024 in the prompt or more than
    2048 together are left out, as benchmarks of this kind do since the first of them.

    Raises:
        ValueError: The file has another format, or no conversation is left.
        OSError: The file cannot be read.
    """
    try:
        entries = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    pairs = _first_exchanges(entries, path)
    rng.shuffle(pairs)
    requests: list[BenchRequest] = []
    for start in range(0, len(pairs), count):
        batch = pairs[start : start + count]
        lengths = await count_tokens([text for pair in batch for text in pair])
        for (prompt, _), num_input, num_answer in zip(
            batch, lengths[::2], lengths[1::2], strict=True
        ):
            num_output = num_answer if output_len is None else output_len
            if _is_usable(num_input, num_output, any_output=output_len is not None):
                requests.append(BenchRequest(prompt, num_output, prompt_tokens=num_input))
        if len(requests) >= count:
            return requests[:count]
    if not requests:
        raise ValueError(f"dataset_path must hold a usable conversation, got none in {path}")
    return [requests[index % len(requests)] for index in range(count)]


def _first_exchanges(entries: Any, path: str) -> list[tuple[str, str]]:
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of conversations, got {type(entries).__name__}")
    pairs = []
    for index, entry in enumerate(entries):
        try:
            turns = entry["conversations"]
            if len(turns) >= 2:
                pairs.append((str(turns[0]["value"]), str(turns[1]["value"])))
        except (KeyError, TypeError):
            raise ValueError(f"entry {index} of {path} is no conversation") from None
    return pairs


def _is_usable(num_input: int, num_output: int, *, any_output: bool) -> bool:
    if num_input < 4 or (num_output < 4 and not any_output):
        return False
    return num_input <= 1024 and num_input + num_output <= 2048
