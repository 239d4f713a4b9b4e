"""Ids of host blocks: as on the device, but content is only kept where it is asked for."""

import pytest

from jpaged.host_pool import HostBlockPool

HASH = b"h" * 32


def allocate(pool, num_blocks):
    ids = pool.allocate(num_blocks)
    assert ids is not None
    pool.check_invariants()
    return ids


def test_all_blocks_are_handed_out_and_none_is_block_0():
    pool = HostBlockPool(3, 16)
    assert pool.num_usable_blocks == pool.num_free_blocks == 3
    assert sorted(allocate(pool, 3)) == [1, 2, 3]
    assert pool.allocate(1) is None


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_a_pool_without_blocks_is_refused(num_blocks):
    with pytest.raises(ValueError, match="num_blocks of the host pool must be at least 1, got"):
        HostBlockPool(num_blocks, 16)


@pytest.mark.parametrize("keeps_content", [True, False])
def test_content_is_forgotten_with_the_last_reference_unless_it_is_a_cache(keeps_content):
    pool = HostBlockPool(3, 16, keeps_content)
    (block_id,) = allocate(pool, 1)
    pool.register(block_id, HASH)
    pool.touch([block_id])
    assert pool.free([block_id]) == []
    assert pool.cached == {HASH: block_id}
    assert pool.free([block_id]) == [block_id]
    pool.check_invariants()
    assert (HASH in pool.cached) is keeps_content


def test_a_refreshed_block_is_handed_out_last():
    pool = HostBlockPool(2, 16, keeps_content=True)
    first, second = allocate(pool, 2)
    for number, block_id in enumerate((first, second)):
        pool.register(block_id, bytes([number]) * 32)
        pool.free([block_id])
    pool.refresh(first)
    pool.check_invariants()
    assert allocate(pool, 1) == [second]
    pool.refresh(second)  # used: nothing to do
    assert allocate(pool, 1) == [first]
