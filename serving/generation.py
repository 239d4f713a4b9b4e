"""The engine requests behind one HTTP request: one for each prompt, run together."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, cast

from jpaged.outputs import CompletionOutput, RequestOutput
from jpaged.sampling_params import SamplingParams
from jpaged.serving.errors import ApiError
from jpaged.serving.service import Service

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]
"""Place of a prompt among those of the request, and what is new of it."""

_MAX_WAITING = 64
"""Outputs of several prompts that may wait for a slow client before their readers wait too."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A prompt for the engine."""

    prompt: Mapping[str, Any]
    params: SamplingParams

    @property
    def token_ids(self) -> list[int]:
        """Of the prompt."""
        return self.prompt["prompt_token_ids"]


class Generation:
    """Runs the jobs of one HTTP request; ending it early aborts those that run.

    Args:
        service: For the engine.
        answer_id: What the client sees as id.
        jobs: At least one.
        priority: Of the request.
        fairness_key: Whose request it is.
    """

    def __init__(
        self,
        service: Service,
        answer_id: str,
        jobs: Sequence[Job],
        *,
        priority: int,
        fairness_key: str | None,
    ) -> None:
        self.jobs = jobs
        self._service = service
        self._answer_id = answer_id
        self._priority = priority
        self._fairness_key = fairness_key

    async def collect(self) -> list[RequestOutput]:
        """The last output of each job, in their order.

        Raises:
            Exception: What the engine raised for the first job that failed.
        """
        if len(self.jobs) == 1:
            return [await self._last(self.jobs[0])]
        tasks = [asyncio.ensure_future(self._last(job)) for job in self.jobs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await _end(tasks)

    async def stream(self, interval: int = 1) -> Outputs:
        """Outputs as they come, of all jobs.

        Args:
            interval: Tokens of a continuation that are told together, after the first.
        """
        source = self._single() if len(self.jobs) == 1 else self._merged()
        if interval > 1:
            source = _coalesced(source, interval)
        async with contextlib.aclosing(source):
            async for pair in source:
                yield pair

    def _outputs(self, job: Job) -> AsyncGenerator[RequestOutput, None]:
        outputs = self._service.engine.generate(
            job.prompt,
            job.params,
            self._service.engine_id(self._answer_id),
            priority=self._priority,
            fairness_key=self._fairness_key,
        )
        return cast("AsyncGenerator[RequestOutput, None]", outputs)

    async def _last(self, job: Job) -> RequestOutput:
        last = None
        async with contextlib.aclosing(self._outputs(job)) as outputs:
            async for last in outputs:
                self._observe(last, job)
        assert last is not None, "an engine that ends without output raises"
        return last

    async def _single(self) -> Outputs:
        job = self.jobs[0]
        async with contextlib.aclosing(self._outputs(job)) as outputs:
            async for output in outputs:
                self._observe(output, job)
                yield 0, output

    async def _merged(self) -> Outputs:
        queue: asyncio.Queue[tuple[int, RequestOutput] | BaseException | None]
        queue = asyncio.Queue(_MAX_WAITING)

        async def read(place: int, job: Job) -> None:
            try:
                async with contextlib.aclosing(self._outputs(job)) as outputs:
                    async for output in outputs:
                        self._observe(output, job)
                        await queue.put((place, output))
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.ensure_future(read(*pair)) for pair in enumerate(self.jobs)]
        try:
            num_running = len(tasks)
            while num_running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    num_running -= 1
                else:
                    yield item
        finally:
            await _end(tasks)

    def _observe(self, output: RequestOutput, job: Job) -> None:
        self._service.metrics.observe(output, job.params)
        if output.finished and any(part.finish_reason == "abort" for part in output.outputs):
            raise ApiError(
                503, "the server ended this request", type="server_error", code="aborted"
            )


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _coalesced(source: Outputs, interval: int) -> Outputs:
    """The same with the deltas of each continuation put together, `interval` tokens at a time."""
    waiting: dict[tuple[int, int], CompletionOutput] = {}
    started: set[tuple[int, int]] = set()
    async with contextlib.aclosing(source):
        async for place, output in source:
            ready = []
            for new in output.outputs:
                key = place, new.index
                old = waiting.pop(key, None)
                part = new if old is None else _joined(old, new)
                if part.finished or key not in started or len(part.token_ids) >= interval:
                    started.add(key)
                    ready.append(part)
                else:
                    waiting[key] = part
            if ready:
                yield place, dataclasses.replace(output, outputs=ready)


def _joined(old: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    return dataclasses.replace(
        new,
        text=old.text + new.text,
        token_ids=[*old.token_ids, *new.token_ids],
        logprobs=None if new.logprobs is None else [*(old.logprobs or ()), *new.logprobs],
    )
