"""Runs of one system on one trace, and searches over the rate; spread over processes."""

import concurrent.futures
import dataclasses
import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

from benchmarks.paper.baselines import FasterTransformer, Orca, Reservation
from benchmarks.paper.paged import Paged
from benchmarks.paper.simulation import WARMUP_S, Outcome, System, simulate
from benchmarks.paper.step_time import MODELS, Link, StepTime, calibrate, paper_kernel
from benchmarks.paper.traces import Trace

SUSTAINED_LATENCY_S: Final = 0.5
"""A rate is sustained if the mean normalised latency is at most this, in seconds a token: the
middle of the axis of the paper's Figure 12."""

AXIS_END_S: Final = 1.5
"""Runs that are sure to exceed this normalised latency are stopped."""

_RESERVATIONS: Final[dict[str, Reservation]] = {
    "Orca (Max)": "max",
    "Orca (Pow2)": "pow2",
    "Orca (Oracle)": "oracle",
}
_BRACKET = 1.25


OWN_KERNEL: Final = 1 / 0.96
"""Time of this repository's attention kernel over that of reading K and V once: docs/kernels.md,
with OPT-13B's heads (32 x 1600, 40 / 40 heads) on an H200; the same for blocks of 64 and 128."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a run has beside its system, trace and rate.

    Attributes:
        fixed_s: see `StepTime`.
        per_seq_s: see `StepTime`.
        has_paper_kernel: whether paged attention costs what the paper's kernel does, or what this
            repository's does.
        duration_s: how long requests arrive.
        model: a name of `MODELS`.
        seed: of arrivals and order of lengths.
        block_size: of the paged system.
        enable_prefix_caching: of the paged system.
        admission_watermark: of the paged system; None for its default.
        copies: how a preempted sequence is charged: by computing it again (None), or by copies to
            the host and back, one a block and layer ("per block") or one in all ("fused").
        halvings: how often `search` halves a bracket of a factor of 1.25; four leave 1.4 %.
    """

    fixed_s: float
    per_seq_s: float
    has_paper_kernel: bool
    duration_s: float = 3600.0
    model: str = "opt-13b"
    seed: int = 0
    block_size: int = 16
    enable_prefix_caching: bool = False
    admission_watermark: float | None = None
    copies: Literal["per block", "fused"] | None = None
    halvings: int = 4

    def replace(self, **changes: Any) -> "Setting":
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    @property
    def step_time(self) -> StepTime:
        """Of the baselines."""
        return StepTime(model=MODELS[self.model], fixed_s=self.fixed_s, per_seq_s=self.per_seq_s)

    @property
    def kernel(self) -> float:
        """Of the paged system."""
        return paper_kernel(self.block_size) if self.has_paper_kernel else OWN_KERNEL


def paper_setting() -> Setting:
    """Everything as in the paper's systems: host costs as calibrated, the paper's kernel."""
    fixed_s, per_seq_s = calibrate()
    return Setting(fixed_s=fixed_s, per_seq_s=per_seq_s, has_paper_kernel=True)


def device_setting() -> Setting:
    """The device alone: host work hides behind it for all systems; this repository's kernel."""
    return Setting(fixed_s=0.0, per_seq_s=0.0, has_paper_kernel=False)


def make_system(name: str, setting: Setting) -> System:
    """A system by its name in `published.SYSTEMS`.

    Raises:
        KeyError: if there is none of that name.
    """
    model = MODELS[setting.model]
    if name == "paged":
        link = None if setting.copies is None else Link(model, setting.copies == "fused")
        return Paged(
            model.num_slots,
            block_size=setting.block_size,
            enable_prefix_caching=setting.enable_prefix_caching,
            admission_watermark=setting.admission_watermark,
            link=link,
        )
    if name == "FasterTransformer":
        return FasterTransformer(model.num_slots)
    return Orca(model.num_slots, _RESERVATIONS[name])


def run(
    name: str, trace: Trace, rate: float, setting: Setting, limit_s: float = math.inf
) -> Outcome:
    """One system at one rate."""
    step_time = setting.step_time
    if name == "paged":
        step_time = dataclasses.replace(step_time, kernel=setting.kernel)
    jobs = trace.jobs(rate, setting.duration_s, setting.seed)
    system = make_system(name, setting)
    warmup_s = min(WARMUP_S, setting.duration_s / 10)
    return simulate(system, jobs, step_time, rate=rate, limit_s=limit_s, warmup_s=warmup_s)


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """Normalised latency over the rate.

    Attributes:
        system: whose.
        sustained_rate: the highest rate found at `SUSTAINED_LATENCY_S` or less.
        points: the runs, by rate.
    """

    system: str
    sustained_rate: float
    points: list[Outcome]

    def rate_at(self, latency_s: float) -> float | None:
        """The rate of another normalised latency, between runs by straight lines, if in reach."""
        finite = [point for point in self.points if not point.is_overloaded]
        for before, after in itertools.pairwise(finite):
            low, high = before.normalized_latency_s, after.normalized_latency_s
            if low <= latency_s < high:
                return before.rate + (after.rate - before.rate) * (latency_s - low) / (high - low)
        return None


def search(name: str, trace: Trace, guess: float, setting: Setting) -> Curve:
    """The sustained rate, and a curve up to it.

    Args:
        name: the system.
        trace: its requests.
        guess: a rate to start from; decides nothing but the time that the search takes.
        setting: of all runs.
    """
    points: dict[float, Outcome] = {}

    def is_sustained(rate: float) -> bool:
        points[rate] = run(name, trace, rate, setting, AXIS_END_S)
        return points[rate].normalized_latency_s <= SUSTAINED_LATENCY_S

    low = high = guess
    if is_sustained(guess):
        while is_sustained(high := high * _BRACKET):
            low = high
    else:
        while not is_sustained(low := low / _BRACKET):
            high = low
    for _ in range(setting.halvings):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_sustained(middle) else (low, middle)
    for share in (0.4, 0.7, 0.9):
        is_sustained(share * low)
    ordered = [points[rate] for rate in sorted(points)]
    return Curve(name, low, ordered)


class Pool:
    """Calls functions of this module in several processes, or in this one."""

    def __init__(self, num_workers: int) -> None:
        self._executor = None
        if num_workers > 1:
            # Not by fork: the parent may have threads.
            context = multiprocessing.get_context("spawn")
            self._executor = concurrent.futures.ProcessPoolExecutor(num_workers, context)

    def map(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Results in the order of the calls."""
        if self._executor is None:
            return [function(*call) for call in calls]
        futures = [self._executor.submit(function, *call) for call in calls]
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the processes."""
        if self._executor is not None:
            self._executor.shutdown()
