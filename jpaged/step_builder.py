"""A step while the scheduler decides on it: parallel lists, and their order in the output."""

from typing import TYPE_CHECKING

from jpaged.scheduler_output import SchedulerOutput

if TYPE_CHECKING:
    from collections.abc import Sequence as ReadOnlyList

    from jpaged.request import Sequence


class StepBuilder:
    """The step under construction; the scheduler appends to its lists."""

    __slots__ = (
        "admitted",
        "chunk_budget",
        "chunk_samples",
        "chunk_seqs",
        "chunk_sizes",
        "chunk_starts",
        "is_stalled",
        "preempted",
        "seqs",
        "single_samples",
        "starts",
        "table_updates",
        "uses_pending",
    )

    def __init__(self, chunk_budget: int) -> None:
        self.chunk_budget = chunk_budget
        self.is_stalled = False
        # Sequences of one token; decodes are appended by `Scheduler.schedule` itself, for speed.
        self.seqs: list[Sequence] = []
        self.starts: list[int] = []
        self.uses_pending: list[bool] = []
        # Places in `seqs` of single-token chunks that do not sample.
        self.single_samples: list[int] = []
        self.chunk_seqs: list[Sequence] = []
        self.chunk_starts: list[int] = []
        self.chunk_sizes: list[int] = []
        self.chunk_samples: list[bool] = []
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.table_updates: list[tuple[Sequence, int]] = []

    def add_chunk(
        self,
        seq: "Sequence",
        start: int,
        num_tokens: int,
        samples: bool,
        forks: "ReadOnlyList[Sequence]" = (),
    ) -> None:
        """Adds tokens of a prompt, or of known output that is computed again.

        Sequences that fork behind the last of them follow it with no tokens of their own: theirs
        are sampled from the same hidden state. So even a single token then goes among the chunks,
        since decodes stand at the index of their token.
        """
        self.chunk_budget -= num_tokens
        if num_tokens == 1 and not forks:
            if not samples:
                self.single_samples.append(len(self.seqs))
            self.seqs.append(seq)
            self.starts.append(start)
            self.uses_pending.append(False)
            return
        self.chunk_seqs.append(seq)
        self.chunk_starts.append(start)
        self.chunk_sizes.append(num_tokens)
        self.chunk_samples.append(samples)
        if forks:
            self.chunk_seqs.extend(forks)
            self.chunk_starts.extend([start + num_tokens] * len(forks))
            self.chunk_sizes.extend([0] * len(forks))
            self.chunk_samples.extend([True] * len(forks))

    def finish(
        self,
        block_copies: list[tuple[int, int]],
        swaps: tuple[list[tuple[int, int]], list[tuple[int, int]]],
    ) -> SchedulerOutput:
        """What the scheduler hands to the runner."""
        num_decodes = len(self.seqs)
        samples = [True] * num_decodes
        for place in self.single_samples:
            samples[place] = False
        return SchedulerOutput(
            seqs=self.seqs + self.chunk_seqs,
            starts=self.starts + self.chunk_starts,
            num_scheduled_tokens=[1] * num_decodes + self.chunk_sizes,
            samples=samples + self.chunk_samples,
            uses_pending=self.uses_pending + [False] * len(self.chunk_seqs),
            num_decodes=num_decodes,
            num_batched_tokens=num_decodes + sum(self.chunk_sizes),
            admitted=self.admitted,
            preempted=self.preempted,
            swap_outs=swaps[0],
            swap_ins=swaps[1],
            block_copies=block_copies,
            table_updates=self.table_updates,
        )
