"""Which blocks each sequence owns: allocation, sharing, copy-on-write, swap, release, and counters.

Owns the block tables (`Sequence.block_ids`) and the fields of a sequence that say what is in them.
Knows nothing of budgets, rows or order. Running out of blocks is a value (None), not an error. All
operations are O(blocks touched); `stats` is O(live sequences) and `check_invariants` recomputes
everything.

Invariants: a live sequence's blocks cover its computed tokens; a block that is not full of computed
tokens is written by one owner only (a shared one is copied before the first write); a full block is
never written again, except with the content it already stands for.
"""

import dataclasses
import sys
from typing import TYPE_CHECKING

from jpaged.block_pool import BlockPool
from jpaged.host_tier import HostTier
from jpaged.prefix_cache import PrefixCache, hash_block, root_hash

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as ReadOnlyList

    from jpaged.request import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockStats:
    """A snapshot of the pool and what happened to it since the start.

    Attributes:
        num_blocks: blocks that can hold tokens (all but the null block).
        block_size: tokens a block holds.
        used: blocks that sequences own.
        free: blocks that can be handed out, cached ones included.
        cached: blocks findable by content, used or free.
        shared: blocks with more than one owner.
        saved: blocks that would be used on top if nothing were shared.
        allocated_slots: slots of used blocks, shared ones counted once.
        wasted_slots: those of them that hold no token.
        copies: blocks copied on write.
        evictions: cached blocks handed out again.
        prefix_queried_tokens: tokens looked up in the prefix cache when their sequences were first
            admitted.
        prefix_hit_tokens: how many of those were found.
        host_blocks: blocks of the host pool.
        host_used: those that swapped-out sequences own.
        host_cached: those findable by content, used or not.
        host_hits: blocks that the prefix cache found on the host and brought back.
        swapped_out: blocks copied to the host.
        swapped_in: blocks copied from there.
    """

    num_blocks: int
    block_size: int
    used: int
    free: int
    cached: int
    shared: int
    saved: int
    allocated_slots: int
    wasted_slots: int
    copies: int
    evictions: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    host_blocks: int
    host_used: int
    host_cached: int
    host_hits: int
    swapped_out: int
    swapped_in: int


class BlockManager:
    """Gives blocks to sequences and takes them back.

    Attributes:
        block_size: tokens a block holds.
        pool: the blocks.
        prefix_cache: lookup and registration by content.
        num_copies: blocks copied on write so far.
        host: where blocks are swapped to, if anywhere.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        *,
        num_host_blocks: int = 0,
        host_cache: bool = False,
    ) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, block_size)
        self.host = HostTier(self.pool, num_host_blocks, host_cache) if num_host_blocks else None
        self.prefix_cache = PrefixCache(self.pool, enable_prefix_caching)
        self.num_copies = 0
        # Copies not yet taken by the scheduler: destination -> source. A destination is copied to
        # at most once.
        self._copies: dict[int, int] = {}
        # Sequences that own blocks. A dict, for its order and O(1) removal.
        self._live: dict[Sequence, None] = {}
        # Sequences that own host blocks instead.
        self._swapped: dict[Sequence, None] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return self.pool.num_free_blocks

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of the pool that can hold tokens."""
        return self.pool.num_usable_blocks

    @property
    def live_sequences(self) -> "Iterable[Sequence]":
        """Sequences that own blocks, those that got their first ones earliest first."""
        return self._live

    @property
    def num_swapped_seqs(self) -> int:
        """Sequences whose blocks are on the host."""
        return len(self._swapped)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one sequence need."""
        return -(-num_tokens // self.block_size)

    def get_cached_prefix(self, seq: "Sequence") -> list[int]:
        """Ids of cached blocks that a sequence without blocks can start from; takes nothing yet.

        Cached blocks that have gone to the host come back for this.
        """
        if self.host is not None and self.host.pool.keeps_content:
            fetched = self.host.fetch(self.prefix_cache.hashes_to_look_up(seq))
            self._check_copies_precede(fetched)
        return self.prefix_cache.lookup(seq)

    def get_shared_prefix(self, source: "Sequence", seq: "Sequence", num_blocks: int) -> list[int]:
        """Ids of blocks that a sequence without blocks can start from; takes nothing yet.

        The first `num_blocks` of a sibling that holds the same tokens there, and what is cached of
        the sequence's own behind them. The sibling's blocks go before cached ones of equal content,
        which may be others: a group is to hold its prompt once.
        """
        assert source.num_computed_tokens >= num_blocks * self.block_size, (
            f"{source} has not computed {num_blocks} blocks"
        )
        return source.block_ids[:num_blocks] + self.get_cached_prefix(seq)[num_blocks:]

    def allocate_slots(
        self, seq: "Sequence", num_new_tokens: int, cached_block_ids: "ReadOnlyList[int]" = ()
    ) -> list[int] | None:
        """Makes a sequence's next slots writable; the new block ids, or None for lack of room.

        Nothing changes when None is returned. A block that the new tokens would be written to and
        that another sequence shares is replaced by a new one; if it holds tokens already, the copy
        is queued for `take_copies`. No entry of the table before index
        `num_computed_tokens // block_size` changes.

        Args:
            seq: the sequence, whose computed tokens stay as they are but for a cached prefix.
            num_new_tokens: tokens to be computed next, after a cached prefix.
            cached_block_ids: what `get_cached_prefix` or `get_shared_prefix` returned, for a
                sequence without blocks: shared, and counted as computed from now on.
        """
        size, pool, block_ids = self.block_size, self.pool, seq.block_ids
        computed = seq.num_computed_tokens
        num_cached = len(cached_block_ids)
        if num_cached:
            assert not block_ids, f"a cached prefix needs a sequence without blocks, got {seq}"
            computed = num_cached * size
        end = computed + num_new_tokens
        if end <= seq.num_writable_slots:
            return []

        replaced: list[int] = []
        if seq.num_writable_slots < len(block_ids) * size:
            # Forked: blocks from the first unwritten slot on may be shared.
            blocks = pool.blocks
            stop = min(len(block_ids), self.num_blocks_for(end))
            replaced = [
                i for i in range(computed // size, stop) if blocks[block_ids[i]].ref_count > 1
            ]
        num_appended = max(0, self.num_blocks_for(end) - num_cached - len(block_ids))
        num_needed = len(replaced) + num_appended
        if num_cached:
            blocks = pool.blocks
            num_revived = sum(blocks[block_id].ref_count == 0 for block_id in cached_block_ids)
            if num_needed + num_revived > pool.num_free_blocks:
                return None
            pool.touch(list(cached_block_ids))
        new_ids = pool.allocate(num_needed)
        if new_ids is None:
            return None

        if not block_ids:
            self._live[seq] = None
        if num_cached:
            block_ids.extend(cached_block_ids)
            seq.num_computed_tokens = computed
            seq.num_registered_blocks = num_cached
        for index, new_id in zip(replaced, new_ids, strict=False):
            self._replace(block_ids, index, new_id, holds_tokens=index * size < computed)
        block_ids.extend(new_ids[len(replaced) :])
        seq.num_writable_slots = self.num_blocks_for(end) * size
        return new_ids

    def register_full_blocks(self, seq: "Sequence") -> None:
        """Makes newly full blocks findable; worth calling from `seq.register_at` tokens on."""
        self.prefix_cache.register(seq)

    def fork(self, parent: "Sequence", child: "Sequence") -> None:
        """Lets a sequence without blocks share all of its parent's, the partly filled one included.

        Each copies that last block on its next write, unless it is the only owner by then. The
        child's tokens are the caller's to set, equal to the parent's as far as those are computed.
        Copies are made before a step writes: if the parent has tokens scheduled in the step being
        built, neither may be given slots before the next one.
        """
        assert not child.block_ids, f"a fork needs a child without blocks, got {child}"
        assert parent.block_ids, f"a fork needs a parent with blocks, got {parent}"
        assert child.length >= parent.num_computed_tokens, (
            f"{child} is shorter than {parent}'s blocks"
        )
        self.pool.touch(parent.block_ids)
        child.block_ids.extend(parent.block_ids)
        child.block_hashes = parent.block_hashes[: parent.num_computed_tokens // self.block_size]
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_registered_blocks = parent.num_registered_blocks
        child.register_at = parent.register_at
        parent.num_writable_slots = min(parent.num_writable_slots, parent.num_computed_tokens)
        child.num_writable_slots = parent.num_writable_slots
        self._live[child] = None

    def free(self, seq: "Sequence") -> None:
        """Takes back all blocks of a sequence, if any; nothing of it counts as computed then."""
        if not seq.block_ids:
            return
        freed = self.pool.free(seq.block_ids)
        if self._copies:
            for block_id in freed:
                # Nobody will read the copy, and the block may become another copy's destination.
                self._copies.pop(block_id, None)
        seq.block_ids.clear()
        seq.num_computed_tokens = 0
        seq.num_writable_slots = 0
        seq.num_registered_blocks = 0
        seq.register_at = 0
        del self._live[seq]

    def swap_out(self, seqs: "ReadOnlyList[Sequence]") -> bool:
        """Moves all blocks of a group to the host; False, and no effect, for lack of room there.

        What its sequences share they go on sharing. Their computed tokens stay computed; tokens
        that are pending arrive as usual.
        """
        if self.host is None:
            return False
        holders = [seq for seq in seqs if seq.block_ids]
        assert not any(block_id in self._copies for seq in holders for block_id in seq.block_ids), (
            f"swapped out before its copies are made: {holders}"
        )
        tables = self.host.store([seq.block_ids for seq in holders])
        if tables is None:
            return False
        for seq, table in zip(holders, tables, strict=True):
            num_computed_tokens = seq.num_computed_tokens
            self.free(seq)
            seq.host_block_ids = table
            seq.num_computed_tokens = num_computed_tokens
            seq.register_at = sys.maxsize
            self._swapped[seq] = None
        return True

    def num_blocks_to_swap_in(self, seqs: "ReadOnlyList[Sequence]") -> int:
        """Free blocks that a swapped-out group needs to come back and compute all known tokens."""
        assert self.host is not None, "nothing can have been swapped out"
        tables = [seq.host_block_ids for seq in seqs]
        num_shared = seqs[0].num_prompt_tokens // self.block_size
        num_blocks = self.host.num_blocks_to_load(tables)
        num_blocks += max(0, num_shared - max(map(len, tables)))
        partly_filled: set[int] = set()
        for seq, table in zip(seqs, tables, strict=True):
            num_known = self.num_blocks_for(len(seq.token_ids))
            num_blocks += max(0, num_known - max(num_shared, len(table)))
            if seq.num_computed_tokens % self.block_size:
                num_blocks += table[-1] in partly_filled  # to be copied on the next write
                partly_filled.add(table[-1])
        return num_blocks

    def swap_in(self, seqs: "ReadOnlyList[Sequence]") -> bool:
        """Moves a group's blocks back; False, and no effect, for lack of room.

        Blocks that queued copies read must not have been freed since they were queued.
        """
        assert self.host is not None, "nothing can have been swapped out"
        holders = [seq for seq in seqs if seq.host_block_ids]
        tables = self.host.load([seq.host_block_ids for seq in holders])
        if tables is None:
            return False
        for table in tables:
            self._check_copies_precede(table)
        for seq, table in zip(holders, tables, strict=True):
            seq.host_block_ids = []
            seq.block_ids.extend(table)
            del self._swapped[seq]
            self._live[seq] = None
        size, blocks = self.block_size, self.pool.blocks
        for seq in holders:
            unwritten = seq.block_ids[seq.num_computed_tokens // size :]
            is_shared = any(blocks[block_id].ref_count > 1 for block_id in unwritten)
            seq.num_writable_slots = (
                seq.num_computed_tokens if is_shared else len(seq.block_ids) * size
            )
            self.prefix_cache.register(seq)
        return True

    def free_swapped(self, seq: "Sequence") -> None:
        """Takes back all host blocks of a sequence, if any; nothing counts as computed then."""
        if not seq.host_block_ids:
            return
        assert self.host is not None, "nothing can have been swapped out"
        self.host.free(seq.host_block_ids)
        seq.host_block_ids = []
        seq.num_computed_tokens = 0
        seq.register_at = 0
        del self._swapped[seq]

    def take_swaps(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Takes the (source, destination) pairs to the host, and those from there, of a step.

        They are to be copied in this order, and before the step's own copies.
        """
        return ([], []) if self.host is None else self.host.take()

    def take_copies(self) -> list[tuple[int, int]]:
        """Takes the (source, destination) pairs of the next step, all reads before all writes.

        A source may be handed out again and even be another pair's destination; no destination
        occurs twice.
        """
        if not self._copies:
            return []
        copies = [(src, dst) for dst, src in self._copies.items()]
        self._copies.clear()
        return copies

    def stats(self) -> BlockStats:
        """The counters; O(live sequences)."""
        size, pool = self.block_size, self.pool
        held: dict[int, int] = {}
        for seq in self._live:
            computed = seq.num_computed_tokens
            for index in range(computed // size, len(seq.block_ids)):
                block_id = seq.block_ids[index]
                held[block_id] = max(held.get(block_id, 0), computed - index * size, 0)
        return BlockStats(
            num_blocks=pool.num_usable_blocks,
            block_size=size,
            used=pool.num_used_blocks,
            free=pool.num_free_blocks,
            cached=len(pool.cached),
            shared=pool.num_shared,
            saved=pool.num_references - pool.num_used_blocks,
            allocated_slots=pool.num_used_blocks * size,
            wasted_slots=sum(size - min(tokens, size) for tokens in held.values()),
            copies=self.num_copies,
            evictions=pool.num_evictions,
            prefix_queried_tokens=self.prefix_cache.num_queried_tokens,
            prefix_hit_tokens=self.prefix_cache.num_hit_tokens,
            **self._host_stats(),
        )

    def check_invariants(self) -> None:
        """Recomputes everything from scratch.

        Raises:
            AssertionError: on a bug of ours, with both sides of the equation that does not hold.
        """
        size, pool = self.block_size, self.pool
        pool.check_invariants()
        owners = [0] * pool.num_blocks
        owners[pool.NULL_BLOCK] = 1
        writers: dict[int, Sequence] = {}
        for seq in self._live:
            assert seq.block_ids, f"live sequences own blocks: {seq}"
            for block_id in seq.block_ids:
                owners[block_id] += 1
            capacity = len(seq.block_ids) * size
            assert seq.num_computed_tokens <= capacity, f"computed > capacity: {seq}, {capacity}"
            assert seq.num_computed_tokens <= seq.length, f"computed > length: {seq}, {seq.length}"
            assert seq.num_writable_slots <= capacity, (
                f"writable > capacity: {seq.num_writable_slots} > {capacity}"
            )
            for block_id in seq.block_ids[
                seq.num_computed_tokens // size : seq.num_writable_slots // size
            ]:
                assert block_id not in writers, (
                    f"block {block_id} has two writers: {seq}, {writers[block_id]}"
                )
                writers[block_id] = seq
            full = min(seq.num_computed_tokens, len(seq.token_ids)) // size
            assert seq.num_registered_blocks <= full, (
                f"registered > full blocks: {seq.num_registered_blocks} > {full} of {seq}"
            )
            self._check_hashes(seq, full)
        counts = [block.ref_count for block in pool.blocks]
        assert counts == owners, f"ref counts != table occurrences: {counts} != {owners}"
        for dst in self._copies:
            assert counts[dst] > 0, f"block {dst} is a copy's destination but free"
        for seq in self._swapped:
            assert seq.host_block_ids, f"swapped-out sequences own host blocks: {seq}"
            assert not seq.block_ids, f"swapped out, but {seq}"
            num_blocks = self.num_blocks_for(seq.num_computed_tokens)
            assert len(seq.host_block_ids) == num_blocks, f"{seq.host_block_ids} of {seq}"
        if self.host is not None:
            self.host.check_invariants(seq.host_block_ids for seq in self._swapped)

    def _host_stats(self) -> dict[str, int]:
        host = self.host
        return {
            "host_blocks": 0 if host is None else host.pool.num_usable_blocks,
            "host_used": 0 if host is None else host.pool.num_used_blocks,
            "host_cached": 0 if host is None else len(host.pool.cached),
            "host_hits": 0 if host is None else host.num_fetched,
            "swapped_out": 0 if host is None else host.num_swapped_out,
            "swapped_in": 0 if host is None else host.num_swapped_in,
        }

    def _check_copies_precede(self, block_ids: "ReadOnlyList[int]") -> None:
        """A step swaps before it copies, so a source must not be freed and swapped into in one."""
        if self._copies:
            sources = set(self._copies.values())
            assert sources.isdisjoint(block_ids), f"{sources} are to be copied, not {block_ids}"

    def _replace(self, block_ids: list[int], index: int, new_id: int, holds_tokens: bool) -> None:
        old_id = block_ids[index]
        if holds_tokens:
            # A source that is itself a copy not yet made has nothing in it: copy from where its
            # content is.
            self._copies[new_id] = self._copies.get(old_id, old_id)
            self.num_copies += 1
        self.pool.free([old_id])
        block_ids[index] = new_id

    def _check_hashes(self, seq: "Sequence", num_full: int) -> None:
        parent, size = root_hash(seq.request.cache_salt), self.block_size
        for index in range(num_full):
            parent = hash_block(parent, seq.token_ids[index * size : (index + 1) * size])
            if index < len(seq.block_hashes):
                assert seq.block_hashes[index] == parent, f"stale hash of block {index} of {seq}"
            block_hash = self.pool.blocks[seq.block_ids[index]].block_hash
            assert block_hash in (None, parent), f"block {index} of {seq} is registered as another"
        for block_id in seq.block_ids[num_full:]:
            block_hash = self.pool.blocks[block_id].block_hash
            assert block_hash is None, f"block {block_id} of {seq} is registered but not full"
