"""The systems that the paper compares with: Orca with three ways to reserve, FasterTransformer.

Written after the paper's description of its re-implementations. Where that leaves something open,
they get the benefit: a request's prompt is computed once and copied to its other sequences, prompts
need no chunks, the number of running requests has no limit but memory, and a beam that continues in
its own place is not copied.
"""

from collections import defaultdict, deque
from typing import Literal, get_args

from benchmarks.paper.beams import BeamRecord, record_of
from benchmarks.paper.buddy import BuddyAllocator
from benchmarks.paper.simulation import Usage
from benchmarks.paper.step_time import StepWork
from benchmarks.paper.traces import MAX_MODEL_LEN, Job

Reservation = Literal["max", "pow2", "oracle"]

MIN_AREA = 16
"""Slots of the smallest area of the buddy allocator."""


def reserved_tokens(job: Job, reservation: Reservation) -> int:
    """Slots that Orca asks for, for each sequence of a request."""
    if reservation == "max":
        return MAX_MODEL_LEN
    output = job.output_tokens
    if reservation == "pow2":
        output = 1 << (output - 1).bit_length()
    return min(job.prompt_tokens + output, MAX_MODEL_LEN)


class _Running:
    """A request in Orca's batch, and the step in which it ends."""

    __slots__ = ("areas", "first_step", "job", "record")

    def __init__(self, job: Job, areas: list[int], first_step: int) -> None:
        self.job = job
        self.areas = areas
        self.first_step = first_step
        is_replayed = job.is_beam and job.num_seqs > 1
        self.record: BeamRecord | None = record_of(job.num_seqs, job.index) if is_replayed else None


class Orca:
    """Iteration-level scheduling over contiguous areas of a buddy allocator, in order of arrival.

    A sequence's area is reserved when its request joins the batch and holds everything it may
    become. Nothing is shared: a beam that takes the place of another is copied as a whole.

    Sums over the batch are kept up to date instead of being walked, so a step costs no more than
    the requests that join or leave in it.
    """

    def __init__(self, num_slots: int, reservation: Reservation) -> None:
        """Starts empty.

        Raises:
            ValueError: if the way to reserve is unknown.
        """
        if reservation not in get_args(Reservation):
            raise ValueError(
                f"reservation must be one of {get_args(Reservation)}, got {reservation!r}"
            )
        self.reservation: Reservation = reservation
        self.num_preemptions = 0
        self.buddy = BuddyAllocator(num_slots, MIN_AREA, MAX_MODEL_LEN)
        self._waiting: deque[Job] = deque()
        self._step = 0
        self._ending: dict[int, list[_Running]] = defaultdict(list)
        self._beams: dict[int, _Running] = {}
        self._num_running = 0
        # Over the running sequences: how many, their tokens now, their last lengths, their areas'
        # asked-for sizes.
        self._num_seqs = self._tokens = self._final_tokens = self._asked_tokens = 0

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return self._num_running

    def add(self, job: Job) -> None:
        """Puts a request in line."""
        self._waiting.append(job)

    def start_step(self) -> StepWork | None:
        """Admits whoever fits, in order, and runs the batch."""
        work = StepWork(
            num_seqs=self._num_seqs, num_tokens=self._num_seqs, context_tokens=self._tokens
        )
        for beams in self._beams.values():
            assert beams.record is not None
            # The first step forks all beams from the prompt, the second computes their first tokens
            # and is the first after which some beams may take the place of others.
            since = self._step - beams.first_step - 2
            if since >= 0:
                replaced = beams.record.num_replaced
                tokens = beams.job.prompt_tokens + since + 1
                work.copied_tokens += replaced[since % len(replaced)] * tokens
        while self._waiting and (areas := self._reserve(self._waiting[0])) is not None:
            self._admit(self._waiting.popleft(), areas, work)
        return work if self._num_running else None

    def end_step(self) -> list[Job]:
        """Every sequence has one token more; those that are complete leave."""
        self._tokens += self._num_seqs
        done = self._ending.pop(self._step, [])
        self._step += 1
        for running in done:
            job = running.job
            for start in running.areas:
                self.buddy.free(start)
            self._beams.pop(job.index, None)
            self._num_running -= 1
            self._num_seqs -= job.num_seqs
            self._tokens -= job.num_seqs * (job.prompt_tokens + job.output_tokens)
            self._count(job, -1)
        return [running.job for running in done]

    def usage(self) -> Usage:
        """As in the paper's Figure 2; rounding an area up to a power of two is in no part."""
        return Usage(
            tokens=self._tokens,
            reserved=self._final_tokens - self._tokens,
            internal=self._asked_tokens - self._final_tokens,
            allocated=self.buddy.num_slots - self.buddy.num_free_slots,
            total=self.buddy.num_slots,
        )

    def _reserve(self, job: Job) -> list[int] | None:
        areas: list[int] = []
        for _ in range(job.num_seqs):
            start = self.buddy.allocate(reserved_tokens(job, self.reservation))
            if start is None:
                for area in areas:
                    self.buddy.free(area)
                return None
            areas.append(start)
        return areas

    def _admit(self, job: Job, areas: list[int], work: StepWork) -> None:
        running = _Running(job, areas, self._step)
        self._ending[self._step + job.output_tokens - 1].append(running)
        if running.record is not None:
            self._beams[job.index] = running
        self._num_running += 1
        self._num_seqs += job.num_seqs
        self._tokens += job.num_seqs * job.prompt_tokens
        self._count(job, 1)
        add_prompt(work, job.prompt_tokens, job.num_seqs)
        work.copied_tokens += (job.num_seqs - 1) * job.prompt_tokens

    def _count(self, job: Job, sign: int) -> None:
        asked = reserved_tokens(job, self.reservation)
        self._asked_tokens += sign * job.num_seqs * asked
        self._final_tokens += sign * job.num_seqs * (job.prompt_tokens + job.output_tokens)


def add_prompt(work: StepWork, num_tokens: int, num_seqs: int) -> None:
    """Adds a whole prompt to a step, after which each of its sequences gets a token."""
    work.num_tokens += num_tokens
    work.num_seqs += num_seqs
    work.prompt_pairs += num_tokens * (num_tokens + 1) // 2


class FasterTransformer:
    """Static batches: whoever waits, as many as fit; all of a batch end with its longest.

    A batch is padded to its longest prompt and runs until its longest output is done. The paper
    gives it the largest batch that memory allows; here it is even told the outputs beforehand, and
    takes as many requests as fit when each has the slots of the batch's longest prompt and output.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_preemptions = 0
        self._num_slots = num_slots
        self._waiting: deque[Job] = deque()
        self._batch: list[Job] = []
        self._longest_prompt = self._longest_output = self._produced = 0

    @property
    def num_running(self) -> int:
        """Requests of the batch that are not complete."""
        return sum(self._produced < job.output_tokens for job in self._batch)

    def add(self, job: Job) -> None:
        """Puts a request in line."""
        self._waiting.append(job)

    def start_step(self) -> StepWork | None:
        """The batch's next token, or the next batch's prompts."""
        if self._batch:
            size = len(self._batch)
            context = size * (self._longest_prompt + self._produced)
            return StepWork(num_seqs=size, num_tokens=size, context_tokens=context)
        while self._waiting and self._fits(self._waiting[0]):
            job = self._waiting.popleft()
            self._longest_prompt = max(self._longest_prompt, job.prompt_tokens)
            self._longest_output = max(self._longest_output, job.output_tokens)
            self._batch.append(job)
        work = StepWork()
        for _ in self._batch:
            add_prompt(work, self._longest_prompt, 1)
        return work if self._batch else None

    def end_step(self) -> list[Job]:
        """All requests of the batch at once, when the longest is complete."""
        self._produced += 1
        if self._produced < self._longest_output:
            return []
        done, self._batch = self._batch, []
        self._longest_prompt = self._longest_output = self._produced = 0
        return done

    def usage(self) -> Usage:
        """Padding is never used, and neither is what a complete request holds on to."""
        tokens = final = 0
        for job in self._batch:
            tokens += job.prompt_tokens + min(self._produced, job.output_tokens)
            final += job.prompt_tokens + job.output_tokens
        allocated = len(self._batch) * (self._longest_prompt + self._longest_output)
        return Usage(tokens, final - tokens, allocated - final, allocated, self._num_slots)

    def _fits(self, job: Job) -> bool:
        prompt = max(self._longest_prompt, job.prompt_tokens)
        output = max(self._longest_output, job.output_tokens)
        return (len(self._batch) + 1) * (prompt + output) <= self._num_slots
