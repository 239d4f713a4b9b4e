"""One discrete-event loop for all systems: arrivals, steps of modelled length, measurements.

A system decides who runs and where its K and V lie; the step-time model says how long that takes.
The loop never looks inside a system.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

from benchmarks.paper.step_time import StepTime, StepWork
from benchmarks.paper.traces import Job


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Slots of the memory for K and V at one moment.

    Attributes:
        tokens: hold a token.
        reserved: kept for tokens that a running request will still generate.
        internal: kept for tokens that it never will.
        allocated: all of the areas or blocks given to requests, the three above included.
        total: all there are.
        saved_blocks: blocks that sharing saves at this moment; 0 for a system that shares nothing.
        needed_blocks: blocks that there would be without sharing.
    """

    tokens: int
    reserved: int
    internal: int
    allocated: int
    total: int
    saved_blocks: int = 0
    needed_blocks: int = 0


class System(Protocol):
    """What serves requests."""

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        ...

    @property
    def num_preemptions(self) -> int:
        """Requests that lost their memory so far."""
        ...

    def add(self, job: Job) -> None:
        """Takes a request in."""
        ...

    def start_step(self) -> StepWork | None:
        """Begins the next step; None when there is nothing to run."""
        ...

    def end_step(self) -> list[Job]:
        """Ends it; the requests that are complete."""
        ...

    def usage(self) -> Usage:
        """Its memory now, within a step."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one run measured.

    Means of the batch and of the memory are over the steps until the last arrival, and `warmup_s`
    is left out of everything, as in the paper's runs.

    Attributes:
        rate: requests a second.
        normalized_latency_s: mean over requests of latency by output tokens; infinite if the run
            was stopped because it was sure to exceed the limit.
        mean_batch: requests in a step.
        mean_step_s: length of a step.
        num_requests: requests that arrived.
        served_rate: requests a second from start to end.
        recomputed: tokens that went through the layers beyond those of prompts and outputs, as a
            share of these; below 0 where a prompt is shared.
        num_steps: steps.
        num_preemptions: preempted requests.
        usage: share of all slots by kind, and "allocated".
        saved: blocks saved by sharing, of those needed without.
    """

    rate: float
    normalized_latency_s: float
    mean_batch: float
    mean_step_s: float
    num_requests: int
    served_rate: float
    recomputed: float
    num_steps: int
    num_preemptions: int
    usage: dict[str, float]
    saved: float

    @property
    def is_overloaded(self) -> bool:
        """Whether the run was stopped early."""
        return math.isinf(self.normalized_latency_s)


WARMUP_S = 60.0
# Steps between two looks at the memory, and between two looks at the backlog.
_USAGE_EVERY, _CHECK_EVERY = 8, 512


class _Memory:
    """Sums of `Usage` over the looks at it."""

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}

    def look(self, usage: Usage) -> None:
        for field in dataclasses.fields(Usage):
            value = self._sums.get(field.name, 0) + getattr(usage, field.name)
            self._sums[field.name] = value

    def shares(self) -> dict[str, float]:
        names = ("tokens", "reserved", "internal", "allocated")
        total = self._sums.get("total", 0)
        return {name: self._sums[name] / total for name in names} if total else {}

    def saved(self) -> float:
        needed = self._sums.get("needed_blocks", 0)
        return self._sums["saved_blocks"] / needed if needed else 0.0


def simulate(
    system: System,
    jobs: Sequence[Job],
    step_time: StepTime,
    *,
    rate: float = math.inf,
    limit_s: float = math.inf,
    warmup_s: float = WARMUP_S,
) -> Outcome:
    """Serves all requests to their end, or until the mean must exceed `limit_s` a token.

    Args:
        system: serves them.
        jobs: in order of arrival.
        step_time: how long each step takes.
        rate: at which they arrive, for the record.
        limit_s: normalised latency beyond which nothing is of interest.
        warmup_s: requests that arrive earlier, and steps that begin earlier, are not measured.
    """
    num_measured = sum(job.arrival_s >= warmup_s for job in jobs)
    last_arrival = jobs[-1].arrival_s if jobs else 0.0
    now, arrived, latencies, memory = 0.0, 0, 0.0, _Memory()
    num_steps = num_counted = batch = num_tokens = 0
    counted_s = 0.0
    open_jobs: dict[int, Job] = {}
    is_overloaded = False
    while True:
        while arrived < len(jobs) and jobs[arrived].arrival_s <= now:
            job = jobs[arrived]
            arrived += 1
            system.add(job)
            open_jobs[job.index] = job
        work = system.start_step()
        if work is None:
            if arrived == len(jobs):
                assert not open_jobs, f"{len(open_jobs)} requests are left but nothing runs"
                break
            now = jobs[arrived].arrival_s
            continue
        num_steps += 1
        num_tokens += work.num_tokens
        duration = step_time(work)
        if warmup_s <= now <= last_arrival:
            num_counted += 1
            counted_s += duration
            batch += system.num_running
            if num_counted % _USAGE_EVERY == 1:
                memory.look(system.usage())
        now += duration
        for job in system.end_step():
            del open_jobs[job.index]
            if job.arrival_s >= warmup_s:
                latencies += (now - job.arrival_s) / job.output_tokens
        if num_steps % _CHECK_EVERY == 0 and limit_s < math.inf:
            # What the open requests have waited already will be part of the mean.
            waited = sum(
                (now - job.arrival_s) / job.output_tokens
                for job in open_jobs.values()
                if job.arrival_s >= warmup_s
            )
            if latencies + waited > limit_s * num_measured > 0:
                is_overloaded = True
                break
    # The last token of a sequence is never computed on.
    needed = sum(job.num_seqs * (job.prompt_tokens + job.output_tokens - 1) for job in jobs)
    return Outcome(
        rate=rate,
        normalized_latency_s=math.inf if is_overloaded else latencies / max(1, num_measured),
        mean_batch=batch / max(1, num_counted),
        mean_step_s=counted_s / max(1, num_counted),
        num_requests=len(jobs),
        served_rate=len(jobs) / now if now else 0.0,
        recomputed=num_tokens / needed - 1 if needed else 0.0,
        num_steps=num_steps,
        num_preemptions=system.num_preemptions,
        usage=memory.shares(),
        saved=memory.saved(),
    )
