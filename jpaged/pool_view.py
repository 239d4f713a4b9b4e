"""A picture of the block pool at one moment: every block's state, every live sequence's table.

For people: the live view of `jpaged generate --watch`, and the server's page. O(blocks of the
pool), so not for every step; the counters in `SchedulerStats` are.
"""

import dataclasses
import enum
from typing import TYPE_CHECKING, Any

import numpy as np

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

    def as_dict(self) -> dict[str, Any]:
        """Plain data, small enough to be sent twice a second; JSON and msgpack can hold it.

        Returns:
            block_size: Tokens of a block.
            num_blocks: Blocks of the pool; the first has index 0 here.
            runs: Three numbers for each run of equal blocks: state (see `BlockState`), index of
                the sequence that holds them or -1, how many they are.
            partial: Two numbers for each used block that is not full: its index, tokens in it.
            sequences: Of each one its request id, its place in the request, tokens, blocks.
            counts: Blocks by state ("free", "cached", "used", "shared"; "used" are those of one
                sequence), "saved" (blocks that sharing spares) and "wasted_slots" (places in
                used blocks without a token).
        """
        states = np.array(self.states, np.int8)
        owners, fills = np.array(self.owners, np.int32), np.array(self.fills, np.int32)
        is_new = np.ones(len(states), bool)
        is_new[1:] = (states[1:] != states[:-1]) | (owners[1:] != owners[:-1])
        starts = np.flatnonzero(is_new)
        lengths = np.diff(starts, append=len(states))
        held = states >= BlockState.USED
        partial = np.flatnonzero(held & (fills < self.block_size))
        by_state = np.bincount(states, minlength=len(BlockState)).tolist()
        counts = {state.name.lower(): by_state[state] for state in BlockState}
        tables = sum(len(seq.block_ids) for seq in self.sequences)
        counts["saved"] = tables - counts["used"] - counts["shared"]
        counts["wasted_slots"] = int(held.sum()) * self.block_size - int(fills.sum())
        return {
            "block_size": self.block_size,
            "num_blocks": len(states),
            "runs": np.stack([states[starts], owners[starts], lengths], axis=1).ravel().tolist(),
            "partial": np.stack([partial, fills[partial]], axis=1).ravel().tolist(),
            "sequences": [
                [seq.request_id, seq.seq_index, seq.num_tokens, len(seq.block_ids)]
                for seq in self.sequences
            ],
            "counts": counts,
        }


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
        left = computed
        for block_id in seq.block_ids:
            if owners[block_id] < 0:
                owners[block_id] = index
            fill = min(max(left, 0), size)
            if fill > fills[block_id]:
                fills[block_id] = fill
            left -= size
    states = [_state(block.ref_count, block.block_hash) for block in pool.blocks]
    return PoolView(size, states[1:], owners[1:], fills[1:], sequences)


def _state(ref_count: int, block_hash: bytes | None) -> BlockState:
    if ref_count > 1:
        return BlockState.SHARED
    if ref_count:
        return BlockState.USED
    return BlockState.FREE if block_hash is None else BlockState.CACHED
