"""A picture of the block pool at one moment: every block's state, every live sequence's table.

For people: the live view of `jpaged generate --watch`. O(blocks of the pool), so not for every
step; the counters in `SchedulerStats` are.
"""

import dataclasses
import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jpaged.block_manager import BlockManager


class BlockState(enum.IntEnum):
    """What a block is used for."""

    FREE = 0
    CACHED = 1
    """Free, but its content can still be found: a prefix hit takes it back."""
    USED = 2
    SHARED = 3
    """Used by several sequences; whoever writes to it copies it first."""


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceView:
    """A sequence that holds blocks.

    Attributes:
        request_id: Of its request.
        seq_index: Its place among the sequences of the request.
        num_tokens: Tokens whose K and V its blocks hold.
        block_ids: Its block table.
    """

    request_id: str
    seq_index: int
    num_tokens: int
    block_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PoolView:
    """All blocks, the null block left out: the lists begin with block 1.

    Attributes:
        block_size: Tokens of a block.
        states: Of each block.
        owners: Index in `sequences` of the first sequence that holds the block; -1 if none does.
        fills: Tokens in each used block; 0 in others.
        sequences: Those that hold blocks, oldest first.
    """

    block_size: int
    states: list[BlockState]
    owners: list[int]
    fills: list[int]
    sequences: list[SequenceView]


def view_pool(manager: "BlockManager") -> PoolView:
    """What the block manager holds now."""
    pool, size = manager.pool, manager.block_size
    owners = [-1] * pool.num_blocks
    fills = [0] * pool.num_blocks
    sequences = []
    for index, seq in enumerate(manager.live_sequences):
        computed = seq.num_computed_tokens
        sequences.append(
            SequenceView(seq.request.request_id, seq.seq_index, computed, tuple(seq.block_ids))
        )
        for place, block_id in enumerate(seq.block_ids):
            if owners[block_id] < 0:
                owners[block_id] = index
            fills[block_id] = max(fills[block_id], min(max(computed - place * size, 0), size))
    states = [_state(block.ref_count, block.block_hash) for block in pool.blocks]
    return PoolView(size, states[1:], owners[1:], fills[1:], sequences)


def _state(ref_count: int, block_hash: bytes | None) -> BlockState:
    if ref_count > 1:
        return BlockState.SHARED
    if ref_count:
        return BlockState.USED
    return BlockState.FREE if block_hash is None else BlockState.CACHED
