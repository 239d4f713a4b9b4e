"""The blocks of the pool: reference counts, the order of free ones, eviction.

Host-side bookkeeping only; the K and V live on the device. A block is either free (in the queue, no
references) or used (not in the queue, at least one reference). A free block may still be cached: it
keeps its content and its entry in the map of hashes until it is handed out again. Block 0, the null
block, is neither: padding points at it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Block:
    """One block's bookkeeping; an element of the free queue while it is free."""

    __slots__ = ("block_hash", "block_id", "next_free", "prev_free", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.block_hash: bytes | None = None
        self.prev_free: Block | None = None
        self.next_free: Block | None = None


class FreeBlockQueue:
    """A doubly linked list through the blocks themselves: every operation is O(1).

    The front is handed out first. Blocks without cached content are put at the front, cached ones
    at the back, so that nothing is evicted while an empty block is left, and then the least
    recently freed goes first.
    """

    __slots__ = ("_head", "_num", "_tail")

    def __init__(self) -> None:
        self._head = Block(-1)
        self._tail = Block(-1)
        self._head.next_free = self._tail
        self._tail.prev_free = self._head
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def append(self, block: Block) -> None:
        """Puts a block at the back."""
        self._link(self._tail.prev_free, block, self._tail)

    def append_left(self, block: Block) -> None:
        """Puts a block at the front."""
        self._link(self._head, block, self._head.next_free)

    def pop_left(self) -> Block:
        """Takes the block at the front; the queue must not be empty."""
        block = self._head.next_free
        assert block is not None
        self.remove(block)
        return block

    def remove(self, block: Block) -> None:
        """Takes out a block from wherever it is."""
        before, after = block.prev_free, block.next_free
        assert before is not None, f"block {block.block_id} is not in the free queue"
        assert after is not None, f"block {block.block_id} is not in the free queue"
        before.next_free = after
        after.prev_free = before
        block.prev_free = block.next_free = None
        self._num -= 1

    def block_ids(self) -> list[int]:
        """All ids from front to back, for tests and invariants."""
        ids, block = [], self._head.next_free
        while block is not None and block is not self._tail:
            ids.append(block.block_id)
            block = block.next_free
        return ids

    def _link(self, before: Block | None, block: Block, after: Block | None) -> None:
        assert before is not None
        assert after is not None
        assert block.next_free is None, f"block {block.block_id} is already in the free queue"
        before.next_free = after.prev_free = block
        block.prev_free = before
        block.next_free = after
        self._num += 1


class BlockPool:
    """Hands out block ids and takes them back.

    Attributes:
        num_blocks: blocks of the pool, the null block included.
        block_size: tokens a block holds.
        blocks: bookkeeping by id.
        cached: block id by content hash, of used and free blocks.
        num_evictions: cached blocks handed out again so far.
        num_shared: blocks with more than one reference.
        num_references: references of all blocks together.
        on_evict: told id and hash of each cached block that is about to be handed out again.
    """

    NULL_BLOCK = 0

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Makes a pool in which all blocks but the null block are free.

        Raises:
            ValueError: if there is no room for a real block, or the block size is not positive.
        """
        if num_blocks < 2:
            raise ValueError(
                f"num_blocks must be at least 2 (block 0 is reserved), got {num_blocks}"
            )
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.blocks[self.NULL_BLOCK].ref_count = 1
        self.cached: dict[bytes, int] = {}
        self.num_evictions = 0
        self.num_shared = 0
        self.num_references = 0
        self.on_evict: Callable[[int, bytes], None] | None = None
        self._free = FreeBlockQueue()
        for block in self.blocks[1:]:
            self._free.append(block)

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that can hold tokens."""
        return self.num_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - 1 - len(self._free)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Ids of `num_blocks` blocks with one reference each, or None if so many are not free."""
        if num_blocks > len(self._free):
            return None
        ids = []
        for _ in range(num_blocks):
            block = self._free.pop_left()
            if block.block_hash is not None:
                if self.on_evict is not None:
                    self.on_evict(block.block_id, block.block_hash)
                del self.cached[block.block_hash]
                block.block_hash = None
                self.num_evictions += 1
            block.ref_count = 1
            ids.append(block.block_id)
        self.num_references += num_blocks
        return ids

    def touch(self, block_ids: list[int]) -> None:
        """Adds a reference to each block; a free one (a cache hit) leaves the queue."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            if block.ref_count == 0:
                self._free.remove(block)
            elif block.ref_count == 1:
                self.num_shared += 1
            block.ref_count += 1
        self.num_references += len(block_ids)

    def free(self, block_ids: list[int]) -> list[int]:
        """Drops a reference of each block; returns the ids that became free.

        The list is one sequence's, in order. Its last blocks are freed first: they are the least
        likely to be hit, since a block is of use only with all blocks before it.
        """
        freed = []
        for block_id in reversed(block_ids):
            block = self.blocks[block_id]
            assert block_id != self.NULL_BLOCK, "the null block is never freed"
            assert block.ref_count > 0, f"block {block_id} is freed but has no reference"
            block.ref_count -= 1
            if block.ref_count == 1:
                self.num_shared -= 1
            elif block.ref_count == 0:
                freed.append(block_id)
                if block.block_hash is None:
                    self._free.append_left(block)
                else:
                    self._free.append(block)
        self.num_references -= len(block_ids)
        return freed

    def register(self, block_id: int, block_hash: bytes) -> bool:
        """Makes a used block findable by its content; False if that content is already registered.

        A second block of equal content stays anonymous: it is freed as an empty one.
        """
        block = self.blocks[block_id]
        assert block.ref_count > 0, f"block {block_id} is registered but not used"
        if block_hash in self.cached:
            return False
        assert block.block_hash is None, f"block {block_id} is registered under two hashes"
        block.block_hash = block_hash
        self.cached[block_hash] = block_id
        return True

    def clear_cache(self) -> None:
        """Forgets all cached content; used blocks stay with their owners."""
        for block_id in self.cached.values():
            self.blocks[block_id].block_hash = None
        self.cached.clear()

    def check_invariants(self) -> None:
        """Recomputes everything from scratch.

        Raises:
            AssertionError: on a bug of ours, with both sides of the equation that does not hold.
        """
        free_ids = self._free.block_ids()
        unreferenced = [b.block_id for b in self.blocks if b.ref_count == 0]
        _check_equal(
            "blocks in the free queue", sorted(free_ids), "without reference", unreferenced
        )
        _check_equal("length of the free queue", len(self._free), "walked", len(free_ids))
        _check_equal("references of the null block", self.blocks[0].ref_count, "reserved", 1)
        _check_equal("null block's hash", self.blocks[0].block_hash, "none", None)
        hashes = {b.block_hash: b.block_id for b in self.blocks if b.block_hash is not None}
        _check_equal("map of hashes", self.cached, "hashes on blocks", hashes)
        counts = [b.ref_count for b in self.blocks[1:]]
        _check_equal("num_references", self.num_references, "sum of ref counts", sum(counts))
        shared = sum(count > 1 for count in counts)
        _check_equal("num_shared", self.num_shared, "blocks of two references or more", shared)


def _check_equal(left_name: str, left: object, right_name: str, right: object) -> None:
    assert left == right, f"{left_name} != {right_name}: {left} != {right}"
