"""What the scheduler hands to the runner for one step, and its counters."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jpaged.block_manager import BlockStats
    from jpaged.request import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerOutput:
    """One step. The first five lists are parallel, one entry a scheduled sequence.

    Sequences with one scheduled token come first (`num_decodes` of them: decodes, and chunks of a
    single token), then chunks of any size. Behind the last chunk of a prompt stand the sequences
    that fork from it, with no scheduled token: their first token too is sampled from the chunk's
    last hidden state. Must be executed, in order: blocks it completes are already registered in
    the prefix cache.

    Attributes:
        seqs: what runs.
        starts: position of the first scheduled token: the tokens computed before.
        num_scheduled_tokens: how many tokens, from there on.
        samples: whether the next token is sampled; False for a chunk that does not reach the last
            known token.
        uses_pending: whether the (single) input token is not known to the host yet: the device
            takes the token it sampled last in the sequence's row.
        num_decodes: sequences of query length one that stand first; each at its token's index.
        num_batched_tokens: all scheduled tokens.
        admitted: sequences that got a row in this step, resumed ones included.
        preempted: sequences that lost row and blocks in this step.
        swap_outs: (block, host block) ids to copy to the host before anything else happens, even if
            the step runs nothing.
        swap_ins: (host block, block) ids to copy from the host after those, and before anything
            else.
        block_copies: (source, destination) block ids to copy before anything is written; all reads
            before all writes, and at most one for each scheduled sequence.
        table_updates: (sequence, first changed index): `seq.block_ids` is as in the sequence's last
            step before that index, and new from there on. Sequences not listed kept their tables.
    """

    seqs: "list[Sequence]"
    starts: list[int]
    num_scheduled_tokens: list[int]
    samples: list[bool]
    uses_pending: list[bool]
    num_decodes: int
    num_batched_tokens: int
    admitted: "list[Sequence]"
    preempted: "list[Sequence]"
    swap_outs: list[tuple[int, int]]
    swap_ins: list[tuple[int, int]]
    block_copies: list[tuple[int, int]]
    table_updates: "list[tuple[Sequence, int]]"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run: all that could wait for tokens of earlier steps."""
        return not self.seqs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerStats:
    """A snapshot of the scheduler.

    Attributes:
        num_waiting: requests waiting, preempted ones included.
        num_running: requests running.
        num_running_seqs: sequences running.
        num_steps: steps scheduled so far, empty ones not counted.
        num_preemptions: sequences preempted so far.
        num_swaps: those of them that were swapped out.
        num_swapped: sequences that are swapped out.
        num_prefill_tokens: tokens of prompts, and of output computed again after a preemption, that
            were scheduled so far; what was found in the prefix cache is not among them.
        blocks: the block manager's counters.
    """

    num_waiting: int
    num_running: int
    num_running_seqs: int
    num_steps: int
    num_preemptions: int
    num_swaps: int
    num_swapped: int
    num_prefill_tokens: int
    blocks: "BlockStats"
