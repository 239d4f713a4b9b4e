"""Which copies are queued, who shares what afterwards, and what stays findable where."""

import pytest

from jpaged.block_pool import BlockPool
from jpaged.host_tier import HostTier


def make(num_blocks=8, num_host_blocks=8, keeps_content=False):
    device = BlockPool(num_blocks + 1, 4)
    return device, HostTier(device, num_host_blocks, keeps_content)


def hash_of(number):
    return bytes([number]) * 32


def allocate(device, num_blocks):
    ids = device.allocate(num_blocks)
    assert ids is not None
    return ids


def cached(device, numbers):
    """Blocks of known content, by number, that nobody uses."""
    ids = allocate(device, len(numbers))
    for block_id, number in zip(ids, numbers, strict=True):
        device.register(block_id, hash_of(number))
    device.free(ids)
    return ids


def check(device, tier, *tables):
    device.check_invariants()
    tier.check_invariants(tables)


def test_a_shared_block_is_copied_once_and_stays_shared():
    device, tier = make()
    a, b, c = allocate(device, 3)
    device.touch([a])
    stored = tier.store([[a, b], [a, c]])
    assert stored is not None
    assert stored[0][0] == stored[1][0]
    assert len({*stored[0], *stored[1]}) == 3
    assert tier.pool.num_shared == 1
    device.free([a, b])
    device.free([a, c])
    outs, ins = tier.take()
    assert outs == [(a, stored[0][0]), (b, stored[0][1]), (c, stored[1][1])]
    assert ins == []
    check(device, tier, *stored)

    assert tier.num_blocks_to_load(stored) == 3
    loaded = tier.load(stored)
    assert loaded is not None
    assert loaded[0][0] == loaded[1][0]
    assert (device.num_used_blocks, device.num_shared, device.num_references) == (3, 1, 4)
    assert tier.pool.num_used_blocks == 3, "until the copies are taken"
    check(device, tier)
    outs, ins = tier.take()
    assert (outs, len(ins)) == ([], 3)
    assert dict(ins)[stored[0][0]] == loaded[0][0]
    assert tier.pool.num_used_blocks == 0
    assert (tier.num_swapped_out, tier.num_swapped_in) == (3, 3)
    check(device, tier)
    assert tier.take() == ([], [])


def test_a_full_host_pool_takes_nothing():
    device, tier = make(num_host_blocks=2)
    ids = allocate(device, 3)
    assert tier.store([ids]) is None
    assert tier.take() == ([], [])
    check(device, tier)
    assert tier.store([ids[:2]]) is not None
    assert tier.store([ids[2:]]) is None


def test_a_full_device_gives_nothing_back():
    device, tier = make(num_blocks=3)
    ids = allocate(device, 3)
    stored = tier.store([ids])
    assert stored is not None
    tier.take()
    assert tier.load(stored) is None
    device.free(ids[:2])
    assert tier.load(stored) is None
    check(device, tier, *stored)
    device.free(ids[2:])
    assert tier.load(stored) is not None


def test_a_group_that_ends_while_swapped_out_leaves_nothing():
    device, tier = make()
    stored = tier.store([allocate(device, 2)])
    assert stored is not None
    tier.free(stored[0])
    check(device, tier)
    assert (tier.pool.num_used_blocks, tier.pool.cached) == (0, {})


def test_content_that_the_other_side_knows_is_not_copied():
    device, tier = make()
    a, b = allocate(device, 2)
    device.register(a, hash_of(1))
    device.touch([a])
    one, two = tier.store([[a]]), tier.store([[a, b]])
    assert one is not None
    assert two is not None
    assert one[0][0] == two[0][0], "two groups share a block of known content"
    assert len(tier.take()[0]) == 2
    device.free([a])
    device.free([a, b])
    # It is still in the device's cache.
    assert tier.num_blocks_to_load(one) == 1
    loaded = tier.load(one)
    assert loaded == [[a]]
    assert tier.num_blocks_to_load(two) == 1, "somebody uses it already"
    assert tier.take() == ([], [])
    tier.free(two[0])
    check(device, tier)
    assert tier.pool.cached == {}


def test_what_comes_back_is_findable_again():
    device, tier = make(num_blocks=2)
    (a,) = allocate(device, 1)
    device.register(a, hash_of(1))
    stored = tier.store([[a]])
    assert stored is not None
    device.free([a])
    device.free(allocate(device, 2))
    assert device.cached == {}
    loaded = tier.load(stored)
    assert loaded is not None
    assert device.cached == {hash_of(1): loaded[0][0]}
    check(device, tier)


def test_evicted_blocks_go_to_the_host_only_where_it_is_a_cache():
    for keeps_content in (True, False):
        device, tier = make(num_blocks=2, keeps_content=keeps_content)
        ids = cached(device, [1, 2])
        allocate(device, 1)
        outs, _ = tier.take()
        assert [block_id for block_id, _ in outs] == ([ids[1]] if keeps_content else [])
        assert list(tier.pool.cached) == ([hash_of(2)] if keeps_content else [])
        check(device, tier)


def test_a_lookup_brings_back_what_the_host_has():
    device, tier = make(num_blocks=4, keeps_content=True)
    cached(device, [1, 2, 3])
    device.free(allocate(device, 3))  # takes the empty one and evicts 3 and 2
    assert set(device.cached) == {hash_of(1)}
    outs, _ = tier.take()
    tier.fetch([hash_of(n) for n in (1, 2, 3, 4)])
    assert set(device.cached) == {hash_of(n) for n in (1, 2, 3)}
    assert device.num_used_blocks == 0
    _, ins = tier.take()
    places = dict(outs)
    assert [place for place, _ in ins] == list(places.values())[::-1]
    assert [block for _, block in ins] == [device.cached[hash_of(n)] for n in (2, 3)]
    assert (tier.num_fetched, tier.num_swapped_in) == (2, 2)
    check(device, tier)
    # The host still has them: to evict them again copies nothing.
    allocate(device, 4)
    assert [block for block, _ in tier.take()[0]] != []
    assert set(tier.pool.cached) == {hash_of(n) for n in (1, 2, 3)}
    assert tier.num_swapped_out == 3


def test_a_lookup_ends_at_the_first_block_that_nobody_has_and_where_there_is_no_room():
    device, tier = make(num_blocks=2, keeps_content=True)
    cached(device, [1, 2])
    ids = allocate(device, 2)
    tier.take()
    tier.fetch([hash_of(9), hash_of(1)])
    tier.fetch([hash_of(1), hash_of(2)])
    assert tier.take() == ([], [])
    assert tier.num_fetched == 0
    device.free(ids[:1])
    tier.fetch([hash_of(1), hash_of(2)])
    assert device.cached.keys() == {hash_of(1)}
    check(device, tier)


def test_what_is_fetched_and_handed_out_in_the_same_step_is_not_copied():
    device, tier = make(num_blocks=1, keeps_content=True)
    cached(device, [1])
    device.free(allocate(device, 1))
    tier.take()
    tier.fetch([hash_of(1)])
    allocate(device, 1)
    assert tier.take() == ([], [])
    check(device, tier)


def test_the_host_forgets_the_least_recently_used_first():
    device, tier = make(num_blocks=1, num_host_blocks=2, keeps_content=True)
    for number in (1, 2, 1, 3):
        cached(device, [number])
        tier.take()
    cached(device, [4])
    assert set(tier.pool.cached) == {hash_of(1), hash_of(3)}


def test_swapped_out_blocks_are_not_given_up_for_evicted_ones():
    device, tier = make(num_blocks=3, num_host_blocks=1, keeps_content=True)
    (a,) = allocate(device, 1)
    stored = tier.store([[a]])
    assert stored is not None
    cached(device, [1, 2])
    allocate(device, 2)
    assert [block for block, _ in tier.take()[0]] == [a]
    check(device, tier, *stored)


def test_random_operations_keep_the_invariants():
    import random

    rng = random.Random(5)
    device, tier = make(num_blocks=12, num_host_blocks=9, keeps_content=True)
    running, swapped = [], []
    for _ in range(5000):
        choice = rng.random()
        if choice < 0.35:
            ids = device.allocate(rng.randint(1, 4))
            if ids:
                for block_id in ids:
                    if rng.random() < 0.6:
                        device.register(block_id, hash_of(rng.randrange(20)))
                other = list(ids)
                device.touch(other)
                running.append([ids, other])
        elif choice < 0.5 and running:
            for table in running.pop(rng.randrange(len(running))):
                device.free(table)
        elif choice < 0.65 and running:
            group = running.pop(rng.randrange(len(running)))
            stored = tier.store(group)
            if stored is not None:
                swapped.append(stored)
            for table in group:
                device.free(table)
            tier.take()
        elif choice < 0.8 and swapped:
            index = rng.randrange(len(swapped))
            needed, free = tier.num_blocks_to_load(swapped[index]), device.num_free_blocks
            loaded = tier.load(swapped[index])
            assert (loaded is None) == (needed > free)
            if loaded is not None:
                del swapped[index]
                running.append(loaded)
            tier.take()
        elif choice < 0.9 and swapped:
            for table in swapped.pop(rng.randrange(len(swapped))):
                tier.free(table)
        else:
            tier.fetch([hash_of(rng.randrange(20)) for _ in range(3)])
        if rng.random() < 0.5:
            tier.take()
        check(device, tier, *(table for group in swapped for table in group))
    for group in swapped:
        for table in group:
            tier.free(table)
    tier.take()
    assert tier.pool.num_used_blocks == 0
    assert min(tier.num_swapped_out, tier.num_swapped_in, tier.num_fetched) > 100


@pytest.mark.parametrize("num_blocks", [0, -3])
def test_a_tier_without_blocks_is_refused(num_blocks):
    with pytest.raises(ValueError, match="must be at least 1"):
        HostTier(BlockPool(3, 4), num_blocks, False)
