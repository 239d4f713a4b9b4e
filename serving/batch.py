"""Running a batch of requests through the server's own code, without a socket.

Each line goes through the same application as a request from outside, so that fields, defaults and
errors are the same. Results are written in the order in which they finish.
"""

import asyncio
import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2
from starlette.types import ASGIApp

from jpaged.serving.batch_files import BatchLine, BatchOutput, is_failure
from jpaged.serving.engine import EngineClient
from jpaged.serving.service import REQUEST_ID_HEADER

_BASE_URL = "http://batch"


@dataclasses.dataclass(slots=True)
class BatchCounts:
    """What became of a batch.

    Attributes:
        num_run: Lines of this run, bad ones too.
        num_failed: How many of them went wrong.
        num_prompt_tokens: Tokens of prompts.
        num_tokens: Tokens of answers.
        elapsed_s: How long it took, without the start of the engine.
    """

    num_run: int = 0
    num_failed: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0


async def run_batch(
    app: ASGIApp,
    engine: EngineClient,
    lines: Sequence[BatchLine],
    output: BatchOutput,
    *,
    concurrency: int,
    on_result: Callable[[], object] = lambda: None,
) -> BatchCounts:
    """Runs the lines that have no result yet and writes theirs.

    Args:
        app: The server's application.
        engine: What it runs on; asked whether it lives if a request fails inside.
        lines: Of the input.
        output: Where results go.
        concurrency: Requests that are open at one time.
        on_result: Called after each result.

    Raises:
        EngineDeadError: The engine has ended; what was open has no result.
        OSError: A result cannot be written.
    """
    counts = BatchCounts()
    start_s = time.perf_counter()
    waiting = iter(lines)
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url=_BASE_URL, timeout=None) as client:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(lines))):
                    group.create_task(_work(client, engine, waiting, output, counts, on_result))
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
    counts.elapsed_s = time.perf_counter() - start_s
    return counts


async def _work(
    client: httpx2.AsyncClient,
    engine: EngineClient,
    waiting: Iterator[BatchLine],
    output: BatchOutput,
    counts: BatchCounts,
    on_result: Callable[[], object],
) -> None:
    """Takes one line after another until none is left."""
    for line in waiting:
        if output.has(line):
            continue
        result = _fault(line) if line.fault is not None else await _ask(client, line)
        if result["response"] is not None and result["response"]["status_code"] >= 500:
            await engine.check_health()
        output.write(result)
        _count(counts, result)
        on_result()


async def _ask(client: httpx2.AsyncClient, line: BatchLine) -> dict[str, Any]:
    content = json.dumps(line.body).encode()
    headers = {"Content-Type": "application/json"}
    response = await client.post(line.url, content=content, headers=headers)
    answer = {
        "status_code": response.status_code,
        "request_id": response.headers.get(REQUEST_ID_HEADER),
        "body": response.json(),
    }
    return _head(line) | {"response": answer, "error": None}


def _fault(line: BatchLine) -> dict[str, Any]:
    error = {
        "code": "invalid_line",
        "message": f"line {line.number}: {line.fault}",
        "line": line.number,
    }
    return _head(line) | {"response": None, "error": error}


def _head(line: BatchLine) -> dict[str, Any]:
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id}


def _count(counts: BatchCounts, result: dict[str, Any]) -> None:
    counts.num_run += 1
    counts.num_failed += is_failure(result)
    if not is_failure(result):
        usage = result["response"]["body"]["usage"]
        counts.num_prompt_tokens += usage["prompt_tokens"]
        counts.num_tokens += usage["completion_tokens"]


def _first(errors: BaseExceptionGroup) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
