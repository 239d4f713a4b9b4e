"""This repository's scheduler and block manager as a system of the simulation.

They run as they are. Only the device is missing, and the engine's part is played here: bringing
tokens, choosing beams, ending sequences. No length is known beforehand.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Final

from benchmarks.paper.beams import record_of
from benchmarks.paper.simulation import Usage
from benchmarks.paper.step_time import Link, StepWork
from benchmarks.paper.traces import MAX_MODEL_LEN, Job
from jpaged.block_manager import BlockManager
from jpaged.config import SchedulerConfig
from jpaged.request import Request, Sequence
from jpaged.sampling_params import SamplingParams
from jpaged.scheduler import Scheduler

if TYPE_CHECKING:
    from jpaged.scheduler_output import SchedulerOutput

MAX_NUM_SEQS: Final = 1024
"""More than there are blocks of 16 tokens, so that memory is the only limit."""

MAX_NUM_BATCHED_TOKENS: Final = 2560
"""The default of the vLLM of the paper's time."""


class Paged:
    """Blocks, continuous batching, preemption by recompute.

    Attributes:
        scheduler: the real one.
        link: if given, a preempted sequence is charged as if it had been copied to the host and
            back: its tokens take the time of the copies instead of that of computing them again.
            Whom to preempt and when it resumes stays as it is.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        block_size: int = 16,
        enable_prefix_caching: bool = False,
        admission_watermark: float | None = None,
        max_model_len: int = MAX_MODEL_LEN,
        link: Link | None = None,
    ) -> None:
        # The null block holds no tokens.
        manager = BlockManager(num_slots // block_size + 1, block_size, enable_prefix_caching)
        config = SchedulerConfig(
            max_model_len=max_model_len,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        )
        if admission_watermark is not None:
            config = dataclasses.replace(config, admission_watermark=admission_watermark)
        self.scheduler = Scheduler(config, manager)
        self.link = link
        self._groups: dict[str, _Group] = {}
        self._output: SchedulerOutput | None = None

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return self.scheduler.num_running

    @property
    def num_preemptions(self) -> int:
        """Sequences preempted so far."""
        return self.scheduler.num_preemptions

    def add(self, job: Job) -> None:
        """Puts a request in line."""
        # Equal in the shared prefix, different from all others behind it.
        own = job.prompt_tokens - job.prefix_tokens
        prompt = [0] * job.prefix_tokens + [job.index + 1] * own
        group = self._groups[str(job.index)] = _Group(job)
        params = _params(job.num_seqs)
        is_search = bool(group.parents)
        request = Request(str(job.index), prompt, params, is_beam_search=is_search)
        self.scheduler.add_request(request)

    def start_step(self) -> StepWork | None:
        """Asks the scheduler and counts what it wants done."""
        output = self._output = self.scheduler.schedule()
        for seq in output.preempted:
            sampled = self._groups[seq.request.request_id].sampled
            if seq in sampled:
                # The token that waited for the other beams': it is sampled again.
                sampled.remove(seq)
                self.scheduler.drop_token(seq)
        if output.is_empty:
            return None
        singles = output.num_decodes
        work = StepWork(
            num_seqs=sum(output.samples),
            num_tokens=output.num_batched_tokens,
            context_tokens=sum(output.starts[:singles]) + singles,
            copied_tokens=len(output.block_copies) * self.scheduler.block_manager.block_size,
        )
        rows = zip(
            output.seqs[singles:],
            output.starts[singles:],
            output.num_scheduled_tokens[singles:],
            strict=True,
        )
        for seq, start, count in rows:
            if self.link is not None and seq.num_preemptions:
                # It returns from the host; its newest token alone is computed.
                work.host_s += self._copy_s(count)
                work.num_tokens -= count - 1
                work.context_tokens += start + count
            elif count:
                work.context_tokens += start + count
                work.prompt_pairs += count * start + count * (count + 1) // 2
        if self.link is not None:
            work.host_s += sum(self._copy_s(len(seq.token_ids) - 1) for seq in output.preempted)
        return work

    def end_step(self) -> list[Job]:
        """Brings the step's tokens and ends the sequences that have all of theirs."""
        output, scheduler, groups = self._output, self.scheduler, self._groups
        assert output is not None, "no step was started"
        done = []
        for seq, samples in zip(output.seqs, output.samples, strict=True):
            if not samples:
                continue
            request = seq.request
            group = groups[request.request_id]
            if group.parents:
                group.sampled.add(seq)
                if len(group.sampled) < len(request.sequences):
                    continue
                self._advance_beams(request, group)
                if len(seq.token_ids) < group.final_length:
                    continue
                for beam in request.sequences:
                    scheduler.finish_sequence(beam, "length")
            else:
                scheduler.append_token(seq, 0)
                if len(seq.token_ids) < group.final_length:
                    continue
                scheduler.finish_sequence(seq, "length")
            if request.is_finished:
                done.append(groups.pop(request.request_id).job)
        return done

    def usage(self) -> Usage:
        """From the block manager's own counters."""
        stats = self.scheduler.stats().blocks
        return Usage(
            tokens=stats.allocated_slots - stats.wasted_slots,
            reserved=0,
            internal=stats.wasted_slots,
            allocated=stats.allocated_slots,
            total=stats.num_blocks * stats.block_size,
            saved_blocks=stats.saved,
            needed_blocks=stats.used + stats.saved,
        )

    def _advance_beams(self, request: Request, group: "_Group") -> None:
        """Continues the beams as in the replayed search; the first tokens all follow the prompt."""
        group.sampled.clear()
        output = len(request.sequences[0].token_ids) - group.job.prompt_tokens
        chosen = list(request.sequences)
        if output > 0:
            parents = group.parents[(output - 1) % len(group.parents)]
            chosen = [group.beams[parent] for parent in parents]
        group.beams = self.scheduler.advance_beams(request, [(seq, 0) for seq in chosen])

    def _copy_s(self, num_tokens: int) -> float:
        assert self.link is not None
        num_blocks = math.ceil(num_tokens / self.scheduler.block_manager.block_size)
        return self.link.copy_s(num_blocks, self.scheduler.block_manager.block_size)


class _Group:
    """What the simulation knows of a request.

    Attributes:
        job: the request.
        final_length: tokens of each of its sequences at the end.
        parents: the replayed search, if they are beams.
        beams: its sequences in the order of the beams.
        sampled: beams whose next token is there, while that of others is not.
    """

    __slots__ = ("beams", "final_length", "job", "parents", "sampled")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.final_length = job.prompt_tokens + job.output_tokens
        is_replayed = job.is_beam and job.num_seqs > 1
        self.parents = record_of(job.num_seqs, job.index).parents if is_replayed else []
        self.beams: list[Sequence] = []
        self.sampled: set[Sequence] = set()


@functools.cache
def _params(num_seqs: int) -> SamplingParams:
    return SamplingParams(n=num_seqs, max_tokens=None)
