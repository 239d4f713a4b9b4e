"""The pool's bookkeeping: who gets which block, and in what order."""

import pytest

from jpaged.block_pool import Block, BlockPool, FreeBlockQueue


def hash_of(number: int) -> bytes:
    return number.to_bytes(32, "little")


def allocate(pool: BlockPool, num_blocks: int) -> list[int]:
    ids = pool.allocate(num_blocks)
    assert ids is not None
    pool.check_invariants()
    return ids


def test_all_blocks_but_the_null_block_are_handed_out_once():
    pool = BlockPool(5, 16)
    assert pool.num_usable_blocks == pool.num_free_blocks == 4
    assert sorted(allocate(pool, 4)) == [1, 2, 3, 4]
    assert pool.num_used_blocks == 4


def test_lack_of_room_is_a_value_and_changes_nothing():
    pool = BlockPool(5, 16)
    allocate(pool, 3)
    assert pool.allocate(2) is None
    pool.check_invariants()
    assert pool.num_free_blocks == 1
    assert pool.allocate(0) == []


def test_empty_blocks_are_handed_out_before_cached_ones_are_evicted():
    pool = BlockPool(5, 16)
    ids = allocate(pool, 4)
    pool.register(ids[0], hash_of(0))
    pool.register(ids[1], hash_of(1))
    assert pool.free(ids) == ids[::-1]
    pool.check_invariants()
    assert sorted(allocate(pool, 2)) == sorted(ids[2:])
    assert pool.num_evictions == 0
    # Of one sequence's blocks, the one furthest from the start goes first.
    assert allocate(pool, 1) == [ids[1]]
    assert pool.num_evictions == 1
    assert pool.cached == {hash_of(0): ids[0]}


def test_least_recently_freed_is_evicted_first():
    pool = BlockPool(4, 16)
    first, second, third = allocate(pool, 3)
    for number, block_id in enumerate((first, second, third)):
        pool.register(block_id, hash_of(number))
    for block_id in (second, first, third):
        pool.free([block_id])
    # A hit makes the oldest the youngest.
    pool.touch([second])
    pool.free([second])
    assert [allocate(pool, 1)[0] for _ in range(3)] == [first, third, second]


def test_touch_revives_a_free_block_and_counts_sharing():
    pool = BlockPool(3, 16)
    ids = allocate(pool, 1)
    pool.register(ids[0], hash_of(0))
    pool.free(ids)
    pool.touch(ids)
    pool.check_invariants()
    assert (pool.num_used_blocks, pool.num_shared) == (1, 0)
    pool.touch(ids)
    pool.touch(ids)
    assert (pool.num_references, pool.num_shared) == (3, 1)
    assert pool.free(ids) == []
    assert pool.free(ids) == []
    assert pool.num_shared == 0
    assert pool.free(ids) == ids
    pool.check_invariants()


def test_equal_content_is_registered_once():
    pool = BlockPool(3, 16)
    first, second = allocate(pool, 2)
    assert pool.register(first, hash_of(0))
    assert not pool.register(second, hash_of(0))
    assert not pool.register(first, hash_of(0))
    pool.check_invariants()
    assert pool.cached == {hash_of(0): first}


def test_cleared_cache_forgets_content_but_not_owners():
    pool = BlockPool(3, 16)
    first, second = allocate(pool, 2)
    pool.register(first, hash_of(0))
    pool.register(second, hash_of(1))
    pool.free([second])
    pool.clear_cache()
    pool.check_invariants()
    assert (pool.cached, pool.num_used_blocks) == ({}, 1)
    allocate(pool, 1)
    assert pool.num_evictions == 0


def test_queue_keeps_order_through_removal_from_anywhere():
    queue, blocks = FreeBlockQueue(), [Block(i) for i in range(5)]
    for block in blocks[:3]:
        queue.append(block)
    queue.append_left(blocks[3])
    queue.append(blocks[4])
    assert queue.block_ids() == [3, 0, 1, 2, 4]
    queue.remove(blocks[1])
    queue.remove(blocks[4])
    assert queue.pop_left() is blocks[3]
    assert (queue.block_ids(), len(queue)) == ([0, 2], 2)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match=r"num_blocks must be at least 2 .*got 1"):
        BlockPool(1, 16)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        BlockPool(2, 0)


def test_our_own_bugs_are_caught():
    pool = BlockPool(3, 16)
    ids = allocate(pool, 1)
    with pytest.raises(AssertionError, match="null block is never freed"):
        pool.free([BlockPool.NULL_BLOCK])
    pool.register(ids[0], hash_of(0))
    with pytest.raises(AssertionError, match="under two hashes"):
        pool.register(ids[0], hash_of(1))
    pool.free(ids)
    with pytest.raises(AssertionError, match="has no reference"):
        pool.free(ids)
    with pytest.raises(AssertionError, match="not used"):
        pool.register(ids[0], hash_of(2))
    queue, block = FreeBlockQueue(), Block(7)
    with pytest.raises(AssertionError, match="not in the free queue"):
        queue.remove(block)
    queue.append(block)
    with pytest.raises(AssertionError, match="block 7 is already in the free queue"):
        queue.append(block)


def leak_reference(pool: BlockPool) -> None:
    pool.blocks[1].ref_count = 0


def give_null_block(pool: BlockPool) -> None:
    pool.blocks[0].ref_count = 2


def hash_null_block(pool: BlockPool) -> None:
    pool.blocks[0].block_hash = hash_of(9)


def forget_hash(pool: BlockPool) -> None:
    pool.cached.clear()


def miscount_references(pool: BlockPool) -> None:
    pool.num_references += 1


def miscount_shared(pool: BlockPool) -> None:
    pool.num_shared += 1


def miscount_free(pool: BlockPool) -> None:
    pool._free._num += 1


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (leak_reference, r"blocks in the free queue != without reference: .*\[.*\] != \[.*1"),
        (miscount_free, r"length of the free queue != walked: 3 != 2"),
        (give_null_block, "references of the null block != reserved: 2 != 1"),
        (hash_null_block, "null block's hash != none"),
        (forget_hash, r"map of hashes != hashes on blocks: \{\} != \{.*1\}"),
        (miscount_references, "num_references != sum of ref counts: 3 != 2"),
        (miscount_shared, "num_shared != blocks of two references or more: 1 != 0"),
    ],
)
def test_check_invariants_shows_both_sides(corrupt, message):
    pool = BlockPool(5, 16)
    first, _ = allocate(pool, 2)
    assert first == 1
    pool.register(first, hash_of(0))
    pool.check_invariants()
    corrupt(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check_invariants()
