"""Hashes, lookup and registration of full blocks."""

import pytest

from jpaged.block_manager import BlockManager
from jpaged.prefix_cache import hash_block, root_hash
from jpaged.request import Request, Sequence
from jpaged.sampling_params import SamplingParams

BLOCK_SIZE = 4


def make_sequence(token_ids: list[int], cache_salt: str | None = None) -> Sequence:
    return Request("r", token_ids, SamplingParams(), cache_salt=cache_salt).sequences[0]


def compute(manager: BlockManager, seq: Sequence, num_tokens: int) -> None:
    """Schedules tokens as the scheduler does."""
    cached = [] if seq.block_ids else manager.get_cached_prefix(seq)
    num_tokens -= 0 if seq.block_ids else len(cached) * BLOCK_SIZE
    assert manager.allocate_slots(seq, num_tokens, cached) is not None
    seq.num_computed_tokens += num_tokens
    manager.register_full_blocks(seq)
    manager.check_invariants()


def test_hashes_depend_on_tokens_parent_and_salt():
    root = root_hash(None)
    hashes = {
        root,
        root_hash(""),
        root_hash("a"),
        hash_block(root, [1, 2]),
        hash_block(root, [2, 1]),
        hash_block(root, [1, 2 + 2**16]),
        hash_block(root_hash("a"), [1, 2]),
        hash_block(hash_block(root, [1, 2]), [1, 2]),
    }
    assert len(hashes) == 8
    assert all(len(value) == 32 for value in hashes)
    assert hash_block(root, [1, 2]) == hash_block(root_hash(None), [1, 2])


@pytest.mark.parametrize(
    ("num_tokens", "num_hit_blocks"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (13, 3), (20, 3)]
)
def test_longest_cached_prefix_is_found_and_one_token_left_to_compute(num_tokens, num_hit_blocks):
    manager = BlockManager(20, BLOCK_SIZE)
    owner = make_sequence(list(range(15)))
    compute(manager, owner, 15)
    seq = make_sequence(list(range(num_tokens)))
    assert manager.get_cached_prefix(seq) == owner.block_ids[:num_hit_blocks]


def test_lookup_stops_at_the_first_block_that_differs():
    manager = BlockManager(20, BLOCK_SIZE)
    owner = make_sequence(list(range(16)))
    compute(manager, owner, 16)
    seq = make_sequence([*range(4), 99, *range(5, 17)])
    assert manager.get_cached_prefix(seq) == owner.block_ids[:1]


def test_hit_survives_its_owner_until_the_block_is_handed_out_again():
    manager = BlockManager(6, BLOCK_SIZE)
    owner = make_sequence(list(range(9)))
    compute(manager, owner, 9)
    blocks = list(owner.block_ids)
    manager.free(owner)
    manager.check_invariants()
    again = make_sequence(list(range(9)))
    compute(manager, again, 9)
    assert again.block_ids[:2] == blocks[:2]
    manager.free(again)
    other = make_sequence([7] * 16)
    compute(manager, other, 16)
    # Three empty blocks were there for four: the sequence's second block went, its first is kept.
    assert manager.pool.num_evictions == 1
    assert manager.get_cached_prefix(make_sequence(list(range(9)))) == blocks[:1]


def test_other_salt_never_hits():
    manager = BlockManager(20, BLOCK_SIZE)
    compute(manager, make_sequence(list(range(9)), "a"), 9)
    for salt, num_blocks in ((None, 0), ("", 0), ("b", 0), ("a", 2)):
        assert len(manager.get_cached_prefix(make_sequence(list(range(9)), salt))) == num_blocks


def test_disabled_cache_neither_registers_nor_finds():
    manager = BlockManager(20, BLOCK_SIZE, enable_prefix_caching=False)
    seq = make_sequence(list(range(9)))
    compute(manager, seq, 9)
    assert manager.pool.cached == {}
    assert manager.get_cached_prefix(make_sequence(list(range(9)))) == []
    assert seq.block_hashes == []


def test_block_is_registered_once_its_tokens_are_both_known_and_scheduled():
    manager = BlockManager(20, BLOCK_SIZE)
    seq = make_sequence([1, 2, 3])
    compute(manager, seq, 3)
    seq.num_pending = 1
    # The decode that fills the block is scheduled, but its token is still on the device.
    compute(manager, seq, 1)
    assert manager.pool.cached == {}
    seq.num_pending = 0
    seq.token_ids.append(4)
    manager.register_full_blocks(seq)
    assert list(manager.pool.cached.values()) == seq.block_ids[:1]
    assert seq.register_at == 2 * BLOCK_SIZE
    # Known, but not yet scheduled.
    seq.token_ids.extend([5, 6, 7, 8])
    manager.register_full_blocks(seq)
    assert len(manager.pool.cached) == 1


def test_generated_tokens_are_found_by_a_follow_up_prompt():
    manager = BlockManager(20, BLOCK_SIZE)
    seq = make_sequence([1, 2, 3, 4, 5])
    compute(manager, seq, 5)
    for token_id in (6, 7, 8):
        seq.token_ids.append(token_id)
        compute(manager, seq, 1)
    blocks = list(seq.block_ids)
    manager.free(seq)
    assert manager.get_cached_prefix(make_sequence([*range(1, 9), 50])) == blocks[:2]


def test_request_that_needs_its_whole_prompt_computed_gets_no_hits_but_gives_them():
    manager = BlockManager(20, BLOCK_SIZE)
    compute(manager, make_sequence(list(range(10))), 10)
    params = SamplingParams(n=2)
    request = Request("r", list(range(10)), params, skip_prefix_cache=True)
    first, second = request.sequences
    assert manager.get_cached_prefix(first) == []
    compute(manager, first, 10)
    assert len(manager.get_cached_prefix(second)) == 2


def test_siblings_take_over_the_prompts_hashes():
    manager = BlockManager(20, BLOCK_SIZE)
    request = Request("r", list(range(10)), SamplingParams(n=2), cache_salt="a")
    first, second = request.sequences
    compute(manager, first, 10)
    first.token_ids.extend([70, 71])
    compute(manager, first, 2)
    assert len(first.block_hashes) == 3
    assert manager.get_cached_prefix(second) == first.block_ids[:2]
    assert second.block_hashes == first.block_hashes[:2]
    second.token_ids.extend([80, 81])
    compute(manager, second, 12)
    assert second.block_hashes[2] != first.block_hashes[2]


def test_hashes_are_kept_over_preemption():
    manager = BlockManager(20, BLOCK_SIZE)
    seq = make_sequence(list(range(10)))
    compute(manager, seq, 10)
    hashes, blocks = list(seq.block_hashes), list(seq.block_ids)
    manager.free(seq)
    assert (seq.block_hashes, seq.num_registered_blocks) == (hashes, 0)
    compute(manager, seq, 10)
    assert seq.block_ids[:2] == blocks[:2]


def test_counts_are_the_callers_to_report():
    cache = BlockManager(20, BLOCK_SIZE).prefix_cache
    cache.count(10, 8)
    cache.count(3, 0)
    assert (cache.num_queried_tokens, cache.num_hit_tokens) == (13, 8)
