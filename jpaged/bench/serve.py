"""A benchmark run: waits for the server, sends every request at its time, gathers the answers."""

import asyncio
import time
from collections.abc import Callable, Sequence

import numpy as np

from jpaged.bench.answers import Answer
from jpaged.bench.client import Client
from jpaged.bench.requests import BenchRequest

_RETRY_S = 1.0


async def wait_until_ready(client: Client, timeout_s: float) -> list[dict]:
    """The server's models, once it tells them.

    Args:
        client: Of the server.
        timeout_s: How long to try again; 0 tries once.

    Raises:
        RuntimeError: What was wrong the last time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return await client.models()
        except RuntimeError:
            if time.monotonic() + _RETRY_S > deadline:
                raise
        await asyncio.sleep(_RETRY_S)


async def run_requests(
    client: Client,
    model: str,
    requests: Sequence[BenchRequest],
    times_s: Sequence[float] | np.ndarray,
    *,
    max_concurrency: int | None = None,
    on_answer: Callable[[Answer], object] = lambda answer: None,
) -> tuple[list[Answer], float]:
    """Sends each request at its time, however many answers are still awaited.

    Args:
        client: Of the server.
        model: Asked for in each request.
        requests: What to send.
        times_s: When, in seconds from the start, in increasing order.
        max_concurrency: Requests that may be open at one time; the others wait here.
        on_answer: Called with each answer as it is complete.

    Returns:
        The answers in the order of the requests, and the seconds all of it took.
    """
    gate = asyncio.Semaphore(max_concurrency or len(requests) or 1)
    start_s = time.perf_counter()

    async def send(request: BenchRequest, planned_s: float) -> Answer:
        async with gate:
            answer = await client.send(request, model)
        answer.late_s = max(answer.start_s - planned_s, 0.0)
        on_answer(answer)
        return answer

    tasks: list[asyncio.Task[Answer]] = []
    async with asyncio.TaskGroup() as group:
        for request, at_s in zip(requests, times_s, strict=True):
            if (wait_s := start_s + at_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(send(request, start_s + float(at_s))))
    return [task.result() for task in tasks], time.perf_counter() - start_s
