"""Allocation, fork, copy-on-write and release, by example and against a naive model."""

import itertools
import random

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jpaged.block_manager import BlockManager
from jpaged.config import CacheConfig
from jpaged.request import Request, Sequence
from jpaged.sampling_params import SamplingParams

BLOCK_SIZE = 4


def make_sequence(token_ids: list[int], cache_salt: str | None = None) -> Sequence:
    return Request("r", token_ids, SamplingParams(), cache_salt=cache_salt).sequences[0]


def compute(manager: BlockManager, seq: Sequence, num_tokens: int) -> list[int] | None:
    """Schedules the next tokens as the scheduler does, without a cached prefix."""
    new_ids = manager.allocate_slots(seq, num_tokens)
    if new_ids is not None:
        seq.num_computed_tokens += num_tokens
        manager.register_full_blocks(seq)
    manager.check_invariants()
    return new_ids


def fork(manager: BlockManager, parent: Sequence) -> Sequence:
    child = make_sequence(list(parent.token_ids))
    manager.fork(parent, child)
    manager.check_invariants()
    return child


def test_blocks_come_exactly_when_slots_run_out():
    manager = BlockManager(10, BLOCK_SIZE)
    seq = make_sequence(list(range(20)))
    assert len(compute(manager, seq, 3) or []) == 1
    assert compute(manager, seq, 1) == []
    assert len(compute(manager, seq, 1) or []) == 1
    assert len(compute(manager, seq, 8) or []) == 2
    assert len(seq.block_ids) == len(set(seq.block_ids)) == 4


def test_lack_of_room_is_a_value_and_changes_nothing():
    manager = BlockManager(4, BLOCK_SIZE)
    seq = make_sequence(list(range(20)))
    compute(manager, seq, 5)
    before = (list(seq.block_ids), manager.stats())
    assert compute(manager, seq, 8) is None
    assert (seq.block_ids, manager.stats()) == before
    other = make_sequence(list(range(20)))
    assert compute(manager, other, 9) is None
    assert (other.block_ids, manager.stats()) == ([], before[1])


def test_cached_free_blocks_count_as_room_only_once():
    manager = BlockManager(4, BLOCK_SIZE)
    seq = make_sequence(list(range(12)))
    compute(manager, seq, 8)
    manager.free(seq)
    again = make_sequence(list(range(20)))
    cached = manager.get_cached_prefix(again)
    assert len(cached) == 2
    # Three free blocks, but the hits take two of them.
    assert manager.allocate_slots(again, 5, cached) is None
    manager.check_invariants()
    assert (again.block_ids, manager.num_free_blocks) == ([], 3)
    assert len(manager.allocate_slots(again, 4, cached) or []) == 1
    manager.check_invariants()
    assert again.num_computed_tokens == 8


def test_fork_shares_every_block_and_each_writer_copies_the_last():
    manager = BlockManager(10, BLOCK_SIZE)
    parent = make_sequence(list(range(6)))
    compute(manager, parent, 6)
    first, last = parent.block_ids
    child = fork(manager, parent)
    assert (child.block_ids, child.num_computed_tokens) == ([first, last], 6)
    assert (manager.stats().shared, manager.stats().saved, manager.stats().used) == (2, 2, 2)

    child.token_ids.append(7)
    (new,) = compute(manager, child, 1) or []
    assert child.block_ids == [first, new]
    assert manager.take_copies() == [(last, new)]
    assert manager.take_copies() == []
    # The parent is the last owner now: it writes in place.
    parent.token_ids.append(8)
    assert compute(manager, parent, 1) == []
    assert (parent.block_ids, manager.take_copies()) == ([first, last], [])
    assert (manager.stats().shared, manager.stats().copies) == (1, 1)
    manager.free(parent)
    manager.check_invariants()
    manager.free(child)
    manager.check_invariants()
    assert manager.stats().used == 0


def test_parent_copies_when_it_writes_first():
    manager = BlockManager(10, BLOCK_SIZE)
    parent = make_sequence(list(range(6)))
    compute(manager, parent, 6)
    last = parent.block_ids[1]
    child = fork(manager, parent)
    parent.token_ids.append(7)
    compute(manager, parent, 1)
    assert manager.take_copies() == [(last, parent.block_ids[1])]
    assert child.block_ids[1] == last


@pytest.mark.parametrize("caching", [True, False])
def test_shared_prefix_is_the_siblings_own_and_what_is_cached_behind(caching):
    manager = BlockManager(20, BLOCK_SIZE, caching)
    older, source = make_sequence(list(range(14))), make_sequence(list(range(14)))
    compute(manager, older, 14)
    compute(manager, source, 14)
    assert set(source.block_ids).isdisjoint(older.block_ids)
    seq = make_sequence(list(range(13)))
    before = manager.stats()
    shared = manager.get_shared_prefix(source, seq, 2)
    assert manager.stats() == before, "nothing is taken yet"
    # The third block is known by its content, if at all, and then it is that of the older one.
    assert shared == source.block_ids[:2] + (older.block_ids[2:3] if caching else [])
    assert manager.allocate_slots(seq, 13 - len(shared) * BLOCK_SIZE, shared) is not None
    manager.check_invariants()
    assert seq.num_computed_tokens == len(shared) * BLOCK_SIZE
    assert seq.block_ids[: len(shared)] == shared
    with pytest.raises(AssertionError, match="has not computed 4 blocks"):
        manager.get_shared_prefix(source, make_sequence(list(range(20))), 4)


def test_fork_on_a_block_boundary_copies_nothing():
    manager = BlockManager(10, BLOCK_SIZE)
    parent = make_sequence(list(range(8)))
    compute(manager, parent, 8)
    child = fork(manager, parent)
    for seq in (parent, child):
        seq.token_ids.append(9)
        assert len(compute(manager, seq, 1) or []) == 1
    assert manager.take_copies() == []
    assert parent.block_ids[:2] == child.block_ids[:2]
    assert parent.block_ids[2] != child.block_ids[2]


def test_shared_block_without_tokens_is_replaced_but_not_copied():
    manager = BlockManager(10, BLOCK_SIZE)
    parent = make_sequence(list(range(6)))
    compute(manager, parent, 4)
    assert manager.allocate_slots(parent, 2) is not None  # Allocated ahead.
    child = fork(manager, parent)
    compute(manager, child, 2)
    assert manager.take_copies() == []
    assert parent.block_ids[1] != child.block_ids[1]


def test_copy_on_write_needs_room_too():
    manager = BlockManager(3, BLOCK_SIZE)
    parent = make_sequence(list(range(6)))
    compute(manager, parent, 6)
    child = fork(manager, parent)
    child.token_ids.append(7)
    assert compute(manager, child, 1) is None
    assert (child.block_ids, manager.take_copies()) == (parent.block_ids, [])
    manager.free(parent)
    assert compute(manager, child, 1) == []


def test_copy_of_a_copy_not_yet_made_comes_from_the_origin():
    manager = BlockManager(10, BLOCK_SIZE)
    parent = make_sequence(list(range(6)))
    compute(manager, parent, 6)
    origin = parent.block_ids[1]
    child = fork(manager, parent)
    assert manager.allocate_slots(child, 1) is not None
    grandchild = fork(manager, child)
    assert manager.allocate_slots(grandchild, 1) is not None
    copies = manager.take_copies()
    assert copies == [(origin, child.block_ids[1]), (origin, grandchild.block_ids[1])]


def test_copy_to_a_freed_block_is_dropped():
    manager = BlockManager(5, BLOCK_SIZE)
    parent = make_sequence(list(range(6)))
    compute(manager, parent, 6)
    child = fork(manager, parent)
    assert manager.allocate_slots(child, 1) is not None
    stays = fork(manager, parent)
    assert manager.allocate_slots(stays, 1) is not None
    manager.free(child)
    manager.check_invariants()
    assert manager.take_copies() == [(parent.block_ids[1], stays.block_ids[1])]


def test_free_of_a_sequence_without_blocks_is_nothing():
    manager = BlockManager(5, BLOCK_SIZE)
    seq = make_sequence([1])
    manager.free(seq)
    compute(manager, seq, 1)
    manager.free(seq)
    manager.free(seq)
    manager.check_invariants()
    assert (seq.block_ids, seq.num_computed_tokens, seq.num_writable_slots) == ([], 0, 0)


def test_stats_count_slots_once_and_see_the_waste():
    manager = BlockManager(10, BLOCK_SIZE)
    parent = make_sequence(list(range(6)))
    compute(manager, parent, 6)
    fork(manager, parent)
    other = make_sequence([9])
    compute(manager, other, 1)
    stats = manager.stats()
    assert (stats.num_blocks, stats.used, stats.free, stats.cached) == (9, 3, 6, 1)
    assert (stats.allocated_slots, stats.wasted_slots) == (12, 2 + 3)
    assert (stats.shared, stats.saved, stats.copies, stats.evictions) == (2, 2, 0, 0)


def test_misuse_is_caught():
    manager = BlockManager(10, BLOCK_SIZE)
    parent, child = make_sequence(list(range(6))), make_sequence(list(range(6)))
    with pytest.raises(AssertionError, match="needs a parent with blocks"):
        manager.fork(parent, child)
    compute(manager, parent, 6)
    compute(manager, child, 6)
    with pytest.raises(AssertionError, match="needs a child without blocks"):
        manager.fork(parent, child)
    with pytest.raises(AssertionError, match="cached prefix needs a sequence without blocks"):
        manager.allocate_slots(child, 1, [1])
    with pytest.raises(AssertionError, match="is shorter than"):
        manager.fork(parent, make_sequence([1]))


def unbalance(manager: BlockManager, seq: Sequence) -> None:
    seq.block_ids[0] = seq.block_ids[1]


def lose_blocks(manager: BlockManager, seq: Sequence) -> None:
    seq.block_ids.clear()


def overrun(manager: BlockManager, seq: Sequence) -> None:
    seq.num_computed_tokens = 9


def outrun(manager: BlockManager, seq: Sequence) -> None:
    seq.num_computed_tokens = 7


def overwrite(manager: BlockManager, seq: Sequence) -> None:
    seq.num_writable_slots = 12


def write_shared(manager: BlockManager, seq: Sequence) -> None:
    child = make_sequence(list(seq.token_ids))
    manager.fork(seq, child)
    child.num_writable_slots = seq.num_writable_slots = 8


def register_early(manager: BlockManager, seq: Sequence) -> None:
    seq.num_registered_blocks = 2


def change_tokens(manager: BlockManager, seq: Sequence) -> None:
    seq.token_ids[0] = 99


def change_chain(manager: BlockManager, seq: Sequence) -> None:
    seq.block_hashes[0] = manager.pool.blocks[seq.block_ids[0]].block_hash = b"other"
    manager.pool.cached.clear()
    manager.pool.cached[b"other"] = seq.block_ids[0]
    seq.block_hashes.clear()


def register_partial(manager: BlockManager, seq: Sequence) -> None:
    manager.pool.register(seq.block_ids[1], b"partial")


def copy_to_free(manager: BlockManager, seq: Sequence) -> None:
    manager._copies[9] = 1


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (unbalance, r"ref counts != table occurrences: \[.*\] != \[.*\]"),
        (lose_blocks, "live sequences own blocks"),
        (overrun, "computed > capacity: .*, 8"),
        (outrun, "computed > length: .*, 6"),
        (overwrite, "writable > capacity: 12 > 8"),
        (write_shared, "has two writers"),
        (register_early, "registered > full blocks: 2 > 1"),
        (change_tokens, "stale hash of block 0"),
        (change_chain, "is registered as another"),
        (register_partial, "registered but not full"),
        (copy_to_free, "block 9 is a copy's destination but free"),
    ],
)
def test_check_invariants_notices(corrupt, message):
    manager = BlockManager(10, BLOCK_SIZE)
    seq = make_sequence(list(range(6)))
    compute(manager, seq, 6)
    corrupt(manager, seq)
    with pytest.raises(AssertionError, match=message):
        manager.check_invariants()


def test_cache_config_checks_its_fields():
    config = CacheConfig(num_blocks=2)
    assert (config.block_size, config.enable_prefix_caching) == (16, True)
    with pytest.raises(ValueError, match="num_blocks must be an integer of at least 2, got 1"):
        CacheConfig(num_blocks=1)
    with pytest.raises(ValueError, match="num_blocks must be an integer of at least 2, got True"):
        CacheConfig(num_blocks=True)
    with pytest.raises(ValueError, match=r"block_size must be one of \(8, .*\), got 12"):
        CacheConfig(num_blocks=9, block_size=12)


def contents(token_ids: list[int]) -> list[int]:
    """What a sequence's slots hold, in order: as K and V do, it depends on all tokens so far."""
    hashes, last = [], 0
    for token in token_ids:
        last = hash((last, token))
        hashes.append(last)
    return hashes


class BlockManagerMachine(RuleBasedStateMachine):
    """Random operations; the naive model keeps every sequence's tokens in a plain list.

    `memory` stands for the device: slot -> content. Scheduled copies and writes run in `run_step`:
    swaps, all copies' reads, their writes, and then the tokens'; after that, what the block tables
    lead to, here or on the host, must equal the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(14, BLOCK_SIZE, num_host_blocks=9, host_cache=True)
        self.memory: dict[int, int | None] = {}
        self.host_memory: dict[int, list[int | None]] = {}
        self.swapped: list[list[Sequence]] = []
        self.model: dict[Sequence, list[int]] = {}
        self.scheduled: dict[Sequence, int] = {}  # Sequence -> its first token in the step.

    def pick(self, number: int, idle: bool) -> Sequence:
        seqs = [seq for seq in self.live() if not (idle and seq in self.scheduled)]
        return seqs[number % len(seqs)]

    def live(self) -> list[Sequence]:
        return [seq for seq in self.model if not seq.host_block_ids]

    def has_live(self) -> bool:
        return bool(self.live())

    def has_idle(self) -> bool:
        return len(self.live()) > len(self.scheduled)

    def schedule(self, seq: Sequence, num_tokens: int, cached: list[int]) -> bool:
        free, old = self.manager.num_free_blocks, list(seq.block_ids)
        new_ids = self.manager.allocate_slots(seq, num_tokens, cached)
        if new_ids is None:
            assert (self.manager.num_free_blocks, seq.block_ids) == (free, old)
            return False
        assert all(0 < block_id < self.manager.pool.num_blocks for block_id in new_ids)
        first_changed = 0 if cached else seq.num_computed_tokens // BLOCK_SIZE
        assert cached or old[:first_changed] == seq.block_ids[:first_changed]
        self.scheduled[seq] = seq.num_computed_tokens
        seq.num_computed_tokens += num_tokens
        self.manager.register_full_blocks(seq)
        return True

    # Prompts from a small family, so that prefixes are often cached.
    @rule(
        family=st.integers(0, 1),
        length=st.integers(1, 18),
        change=st.integers(0, 30),
        salt=st.sampled_from([None, None, "a"]),
    )
    def start(self, family: int, length: int, change: int, salt: str | None) -> None:
        token_ids = [family + i % 2 for i in range(length)]
        if change < length:
            token_ids[change] = 999
        seq = make_sequence(token_ids, salt)
        self.run_step_if_sources_are_free()
        cached = self.manager.get_cached_prefix(seq)
        if self.schedule(seq, length - len(cached) * BLOCK_SIZE, cached):
            self.model[seq] = token_ids

    @precondition(has_idle)
    @rule(number=st.integers(0, 99), token_ids=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def append(self, number: int, token_ids: list[int]) -> None:
        seq = self.pick(number, idle=True)
        seq.token_ids.extend(token_ids)
        if self.schedule(seq, len(token_ids), []):
            self.model[seq] = self.model[seq] + token_ids
        else:
            del seq.token_ids[-len(token_ids) :]

    @precondition(has_live)
    @rule(number=st.integers(0, 99))
    def fork(self, number: int) -> None:
        parent = self.pick(number, idle=False)
        child = make_sequence(list(parent.token_ids), parent.request.cache_salt)
        self.manager.fork(parent, child)
        self.model[child] = list(self.model[parent])
        if parent in self.scheduled:
            # Copies are made before what the parent writes in this step: both wait for the next.
            self.scheduled[child] = child.num_computed_tokens

    @precondition(has_live)
    @rule(
        number=st.integers(0, 99),
        num_blocks=st.integers(1, 4),
        token_ids=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    )
    def share_prefix(self, number: int, num_blocks: int, token_ids: list[int]) -> None:
        """Starts a sequence from full blocks of another, whether they are cached or not."""
        self.run_step_if_sources_are_free()
        source = self.pick(number, idle=False)
        num_blocks = min(num_blocks, source.num_computed_tokens // BLOCK_SIZE)
        all_ids = self.model[source][: num_blocks * BLOCK_SIZE] + token_ids
        seq = make_sequence(list(all_ids), source.request.cache_salt)
        shared = self.manager.get_shared_prefix(source, seq, num_blocks)
        assert shared[:num_blocks] == source.block_ids[:num_blocks]
        if self.schedule(seq, len(all_ids) - len(shared) * BLOCK_SIZE, shared):
            self.model[seq] = all_ids

    @precondition(has_idle)
    @rule(number=st.integers(0, 99))
    def free(self, number: int) -> None:
        seq = self.pick(number, idle=True)
        del self.model[seq]
        self.manager.free(seq)

    @precondition(has_idle)
    @rule(number=st.integers(0, 99), num_seqs=st.integers(1, 4))
    def swap_out(self, number: int, num_seqs: int) -> None:
        """Moves several sequences at once, related or not."""
        idle = [seq for seq in self.live() if seq not in self.scheduled]
        start = number % len(idle)
        seqs, manager = idle[start : start + num_seqs], self.manager
        assert manager.host is not None
        changing = {*manager._copies, *manager.host._ins}
        if not changing.isdisjoint(block_id for seq in seqs for block_id in seq.block_ids):
            return  # What a step is still to bring cannot leave before it.
        before = [(seq, list(seq.block_ids), seq.num_computed_tokens) for seq in seqs]
        free = manager.host.pool.num_free_blocks
        if manager.swap_out(seqs):
            self.swapped.append(seqs)
        else:
            assert all(seq.block_ids == block_ids for seq, block_ids, _ in before)
            assert manager.host.pool.num_free_blocks == free
        assert all(seq.num_computed_tokens == computed for seq, _, computed in before)

    @precondition(lambda self: self.swapped)
    @rule(number=st.integers(0, 99))
    def swap_in(self, number: int) -> None:
        self.run_step_if_sources_are_free()
        index = number % len(self.swapped)
        if self.manager.swap_in(self.swapped[index]):
            # What they take over from the cache may be written in this step: it is not idle.
            self.scheduled |= {seq: seq.num_computed_tokens for seq in self.swapped[index]}
            del self.swapped[index]

    @precondition(lambda self: self.swapped)
    @rule(number=st.integers(0, 99))
    def free_swapped(self, number: int) -> None:
        group = self.swapped[number % len(self.swapped)]
        seq = group.pop()
        if not group:
            self.swapped.remove(group)
        del self.model[seq]
        self.manager.free_swapped(seq)

    @rule()
    def clear_cache(self) -> None:
        self.manager.pool.clear_cache()

    def run_step_if_sources_are_free(self) -> None:
        """A step swaps before it copies: what it is to copy must not make room for a swap."""
        blocks = self.manager.pool.blocks
        if any(blocks[src].ref_count == 0 for src in self.manager._copies.values()):
            self.run_step()

    @rule()
    def run_step(self) -> None:
        swap_outs, swap_ins = self.manager.take_swaps()
        assert len({block_id for _, block_id in swap_ins}) == len(swap_ins)
        for block_id, place in swap_outs:
            self.host_memory[place] = [self.memory.get(slot) for slot in self.slots(block_id)]
        for place, block_id in swap_ins:
            for slot, content in zip(self.slots(block_id), self.host_memory[place], strict=True):
                self.memory[slot] = content
        copies = self.manager.take_copies()
        assert len({dst for _, dst in copies}) == len(copies)
        copied = [
            (dst, [self.memory.get(src * BLOCK_SIZE + i) for i in range(BLOCK_SIZE)])
            for src, dst in copies
        ]
        for dst, slots in copied:
            for i, content in enumerate(slots):
                if content is not None:
                    self.memory[dst * BLOCK_SIZE + i] = content
        for seq, start in self.scheduled.items():
            for position, content in enumerate(contents(self.model[seq])):
                if position >= start:
                    self.memory[self.slot(seq, position)] = content
        self.scheduled.clear()
        for seq, token_ids in self.model.items():
            if seq.host_block_ids:
                on_host = [self.host_memory[place] for place in seq.host_block_ids]
                read = list(itertools.chain.from_iterable(on_host))[: len(token_ids)]
            else:
                read = [self.memory.get(self.slot(seq, i)) for i in range(len(token_ids))]
            assert read == contents(token_ids)

    @staticmethod
    def slots(block_id: int) -> range:
        return range(block_id * BLOCK_SIZE, (block_id + 1) * BLOCK_SIZE)

    def slot(self, seq: Sequence, position: int) -> int:
        return seq.block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    @invariant()
    def nothing_is_broken(self) -> None:
        self.manager.check_invariants()
        stats = self.manager.stats()
        owned = {block_id for seq in self.model for block_id in seq.block_ids}
        tables = sum(len(seq.block_ids) for seq in self.model)
        assert (stats.used, stats.free) == (len(owned), stats.num_blocks - len(owned))
        assert stats.saved == tables - len(owned)
        held = {self.slot(seq, i) for seq in self.live() for i in range(len(self.model[seq]))}
        assert stats.wasted_slots == stats.allocated_slots - len(held)

    def teardown(self) -> None:
        self.run_step()
        for seq in self.model:
            self.manager.free(seq)
            self.manager.free_swapped(seq)
        self.manager.check_invariants()
        assert (self.manager.stats().used, self.manager.stats().host_used) == (0, 0)


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, derandomize=True, database=None
)


@pytest.mark.parametrize("seed", range(4))
def test_long_random_run_equals_the_model(seed):
    rng = random.Random(seed)
    machine = BlockManagerMachine()
    for _ in range(2500):
        match rng.choices(range(10), (4, 8, 3, 5, 6, 0.1, 2, 2, 6, 1))[0]:
            case 0:
                machine.start(rng.randint(0, 1), rng.randint(1, 18), rng.randint(0, 30), None)
            case 1 if machine.has_idle():
                machine.append(rng.randrange(99), rng.choices(range(3), k=rng.randint(1, 6)))
            case 2 if machine.has_live():
                machine.fork(rng.randrange(99))
            case 3 if machine.has_idle():
                machine.free(rng.randrange(99))
            case 4:
                machine.run_step()
            case 5:
                machine.clear_cache()
            case 6 if machine.has_live():
                token_ids = rng.choices(range(3), k=rng.randint(1, 6))
                machine.share_prefix(rng.randrange(99), rng.randint(1, 4), token_ids)
            case 7 if machine.has_idle():
                machine.swap_out(rng.randrange(99), rng.randint(1, 4))
            case 8 if machine.swapped:
                machine.swap_in(rng.randrange(99))
            case 9 if machine.swapped:
                machine.free_swapped(rng.randrange(99))
        machine.nothing_is_broken()
    stats = machine.manager.stats()
    counts = (stats.copies, stats.evictions, stats.swapped_out, stats.swapped_in, stats.host_hits)
    assert min(counts) > 10, f"the run did not exercise what it should: {counts}"
    machine.teardown()
