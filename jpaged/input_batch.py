"""The step's inputs: one packed int32 buffer, laid out once for host and device.

The host fills views of a preallocated buffer, sends it in one transfer, and the jitted step takes
the same views of the array it gets. What a sequence keeps from step to step (its block table and
its sampling parameters) lies in arrays indexed by its row, written when it changes, not every step.

Buffers are used in turn: a step in flight may still be reading the one before.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jpaged.compile_plan import StepShape
from jpaged.request import Sequence
from jpaged.sampling_rows import MAX_BANS, NUM_COLUMNS, empty_rows
from jpaged.scheduler_output import SchedulerOutput

# Steps in flight at most: the one that runs and the one that is filled, and one to spare.
NUM_BUFFERS = 3

# Ints (256 bytes): XLA hands a field to a GPU kernel where it lies, and the kernel's bulk copies
# want it aligned.
ALIGNMENT = 64

PENDING_TOKEN = -1
"""In `token_ids`: the token this sequence sampled last, which only the device knows yet."""
NO_TOKEN = -1


@dataclasses.dataclass(frozen=True, slots=True)
class StepArrays:
    """The fields of a packed buffer, on the host (NumPy views) or in the step (slices).

    T tokens, S sequences, B blocks of a table, C block copies: as many as sequences, none where the
    program makes no copies. Rows of padding have query and context length 0 and write to the null
    block; copies of padding copy the null block onto itself.
    """

    token_ids: Any  # i32[T], PENDING_TOKEN where the device has it
    positions: Any  # i32[T]
    slot_mapping: Any  # i32[T]
    next_token_ids: Any  # i32[T], the prompt token that follows, NO_TOKEN unless logprobs are asked
    query_start_loc: Any  # i32[S + 1]
    seq_lens: Any  # i32[S]
    rows: Any  # i32[S]
    samples: Any  # i32[S], whether a token is sampled
    sampling_rows: Any  # i32[S, NUM_COLUMNS]
    ban_tokens: Any  # i32[S, MAX_BANS], none in plain steps
    ban_if_last: Any  # i32[S, MAX_BANS]
    copy_sources: Any  # i32[C]
    copy_destinations: Any  # i32[C]
    block_tables: Any  # i32[S, B]


@functools.cache
def _fields(shape: StepShape, max_blocks: int) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Start, end and shape of each field of `StepArrays` in the buffer."""
    tokens, seqs, copies = shape.num_tokens, shape.num_seqs, shape.num_copies
    num_bans = 0 if shape.plain else MAX_BANS
    shapes: tuple[tuple[int, ...], ...] = (
        (tokens,),
        (tokens,),
        (tokens,),
        (tokens,),
        (seqs + 1,),
        (seqs,),
        (seqs,),
        (seqs,),
        (seqs, NUM_COLUMNS),
        (seqs, num_bans),
        (seqs, num_bans),
        (copies,),
        (copies,),
        (seqs, max_blocks),
    )
    fields, start = [], 0
    for field_shape in shapes:
        end = start + int(np.prod(field_shape))
        fields.append((start, end, field_shape))
        start = -(-end // ALIGNMENT) * ALIGNMENT
    return tuple(fields)


def packed_size(shape: StepShape, max_blocks: int) -> int:
    """Length of the packed buffer."""
    return _fields(shape, max_blocks)[-1][1]


def unpack(packed: Any, shape: StepShape, max_blocks: int) -> StepArrays:
    """The fields of a packed buffer, a NumPy array or a traced one."""
    return StepArrays(
        *(packed[start:end].reshape(s) for start, end, s in _fields(shape, max_blocks))
    )


class InputBatch:
    """Fills packed buffers from what the scheduler decided.

    Args:
        num_rows: Sequences that may run at once.
        max_blocks: Blocks of the longest sequence.
        block_size: Tokens of a block.
        num_blocks: Blocks of the pool; an id outside it is an error here, since the device would
            not say so.
        max_size: Length of the longest packed buffer.
    """

    def __init__(
        self, num_rows: int, max_blocks: int, block_size: int, num_blocks: int, max_size: int
    ) -> None:
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._max_blocks = max_blocks
        self._tables = np.zeros((num_rows, max_blocks), np.int32)
        self._sampling_rows = empty_rows(num_rows)
        self._buffers = [np.zeros(max_size, np.int32) for _ in range(NUM_BUFFERS)]
        self._turn = 0

    def set_row(self, row: int, sampling_row: NDArray[np.int32]) -> None:
        """Gives a row to a sequence that is admitted or resumed."""
        self._sampling_rows[row] = sampling_row

    def fill(
        self,
        scheduled: SchedulerOutput,
        shape: StepShape,
        bans_of: Callable[[Sequence], Seq[tuple[int, int]]],
        wants_prompt_logprobs: Callable[[Sequence], bool],
    ) -> NDArray[np.int32]:
        """The packed buffer of a step, valid until `NUM_BUFFERS` more have been filled.

        Raises:
            RuntimeError: A block id is outside the pool, or the program makes fewer copies than the
                step needs (bugs of ours that must not become somebody else's context).
        """
        self._turn = (self._turn + 1) % NUM_BUFFERS
        packed = self._buffers[self._turn][: packed_size(shape, self._max_blocks)]
        arrays = unpack(packed, shape, self._max_blocks)
        num_seqs, num_tokens = len(scheduled.seqs), scheduled.num_batched_tokens
        rows = np.fromiter((seq.row for seq in scheduled.seqs), np.int32, num_seqs)
        self._update_tables(scheduled.table_updates)

        starts = np.asarray(scheduled.starts, np.int32)
        counts = np.asarray(scheduled.num_scheduled_tokens, np.int32)
        arrays.query_start_loc[0] = 0
        np.cumsum(counts, out=arrays.query_start_loc[1 : num_seqs + 1])
        arrays.query_start_loc[num_seqs + 1 :] = num_tokens
        arrays.seq_lens[:num_seqs] = starts + counts
        arrays.seq_lens[num_seqs:] = 0
        arrays.rows[:num_seqs] = rows
        arrays.rows[num_seqs:] = 0
        arrays.samples[:num_seqs] = scheduled.samples
        arrays.samples[num_seqs:] = 0
        arrays.sampling_rows[:num_seqs] = self._sampling_rows[rows]
        arrays.block_tables[:num_seqs] = self._tables[rows]
        arrays.block_tables[num_seqs:] = 0

        self._fill_copies(arrays, scheduled.block_copies)
        self._fill_tokens(arrays, scheduled, rows, starts, counts, wants_prompt_logprobs)
        arrays.ban_tokens[:] = -1
        for i, seq in enumerate(scheduled.seqs):
            if scheduled.samples[i] and (bans := bans_of(seq)):
                tokens, if_last = zip(*bans, strict=True)
                arrays.ban_tokens[i, : len(bans)] = tokens
                arrays.ban_if_last[i, : len(bans)] = if_last
        return packed

    def _fill_copies(self, arrays: StepArrays, copies: list[tuple[int, int]]) -> None:
        num_copies = len(copies)
        arrays.copy_sources[num_copies:] = 0
        arrays.copy_destinations[num_copies:] = 0
        if not num_copies:
            return
        if num_copies > len(arrays.copy_sources):
            raise RuntimeError(
                f"the step's program makes {len(arrays.copy_sources)} block copies, got {copies}"
            )
        pairs = np.asarray(copies, np.int32)
        if not 0 < pairs.min() <= pairs.max() < self._num_blocks:
            raise RuntimeError(
                f"a copy names a block outside [1, {self._num_blocks - 1}]: {copies}"
            )
        arrays.copy_sources[:num_copies] = pairs[:, 0]
        arrays.copy_destinations[:num_copies] = pairs[:, 1]

    def _update_tables(self, updates: list[tuple[Sequence, int]]) -> None:
        for seq, first in updates:
            block_ids = seq.block_ids[first:]
            if block_ids and not 0 < min(block_ids) <= max(block_ids) < self._num_blocks:
                raise RuntimeError(
                    f"a block table names a block outside [1, {self._num_blocks - 1}]: {seq}"
                )
            self._tables[seq.row, first : first + len(block_ids)] = block_ids

    def _fill_tokens(self, arrays, scheduled, rows, starts, counts, wants_prompt_logprobs) -> None:
        num_tokens, num_decodes = scheduled.num_batched_tokens, scheduled.num_decodes
        arrays.token_ids[num_tokens:] = 0
        arrays.next_token_ids[:] = NO_TOKEN
        positions = arrays.positions
        positions[:num_decodes] = starts[:num_decodes]
        token_rows = np.repeat(rows, counts)
        for i in range(num_decodes):
            arrays.token_ids[i] = (
                PENDING_TOKEN
                if scheduled.uses_pending[i]
                else scheduled.seqs[i].token_ids[scheduled.starts[i]]
            )
        at = num_decodes
        for i in range(len(scheduled.seqs)):
            seq, start, count = scheduled.seqs[i], scheduled.starts[i], int(counts[i])
            if i >= num_decodes:
                arrays.token_ids[at : at + count] = seq.token_ids[start : start + count]
                positions[at : at + count] = np.arange(start, start + count)
            if start + 1 < seq.num_prompt_tokens and wants_prompt_logprobs(seq):
                first = at if i >= num_decodes else i
                following = seq.request.prompt_token_ids[start + 1 : start + 1 + count]
                arrays.next_token_ids[first : first + len(following)] = following
            if i >= num_decodes:
                at += count
        positions[num_tokens:] = 0
        of_token = positions[:num_tokens]
        block_ids = self._tables[token_rows, of_token // self._block_size]
        arrays.slot_mapping[:num_tokens] = (
            block_ids * self._block_size + of_token % self._block_size
        )
        # Padding writes into the null block.
        arrays.slot_mapping[num_tokens:] = 0
