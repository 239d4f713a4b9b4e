"""The buddy allocator of the paper's baselines."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from benchmarks.paper.buddy import BuddyAllocator


def test_an_area_is_a_power_of_two_at_a_multiple_of_itself():
    buddy = BuddyAllocator(256, 16, 128)
    assert [buddy.size_for(n) for n in (1, 16, 17, 100, 128)] == [16, 16, 32, 128, 128]
    assert [buddy.allocate(n) for n in (16, 17, 100)] == [0, 32, 128]
    assert buddy.num_free_slots == 256 - 16 - 32 - 128
    buddy.check_invariants()


def test_free_slots_that_do_not_lie_together_serve_no_large_request():
    buddy = BuddyAllocator(128, 16, 128)
    for _ in range(8):
        buddy.allocate(16)
    assert buddy.allocate(1) is None
    for start in range(0, 128, 32):
        buddy.free(start)
    assert buddy.num_free_slots == 64
    assert buddy.allocate(17) is None
    for start in range(16, 128, 32):
        buddy.free(start)
    assert buddy.allocate(128) == 0


def test_memory_that_is_no_power_of_two_is_used_to_the_last_area():
    # OPT-13B's 15.7K slots: seven areas of 2048, as many as Orca (Max) runs in the paper.
    buddy = BuddyAllocator(15_700, 16, 2048)
    assert buddy.num_slots == 15_696
    assert [buddy.allocate(2048) is not None for _ in range(8)] == [True] * 7 + [False]
    assert [buddy.allocate(n) is not None for n in (1024, 256, 64, 16)] == [True] * 4
    assert buddy.num_free_slots == 0
    buddy.check_invariants()


def test_what_can_never_be_is_refused():
    with pytest.raises(ValueError, match=r"min_size must be a power of two, got 12"):
        BuddyAllocator(64, 12, 16)
    with pytest.raises(ValueError, match=r"max_size must be a power of two, got 0"):
        BuddyAllocator(64, 16, 0)
    with pytest.raises(ValueError, match=r"min_size must be at most max_size=16, got 32"):
        BuddyAllocator(64, 32, 16)
    buddy = BuddyAllocator(64, 16, 32)
    with pytest.raises(ValueError, match=r"num_slots must be in \[1, 32\], got 33"):
        buddy.allocate(33)
    with pytest.raises(KeyError):
        buddy.free(0)


class Machine(RuleBasedStateMachine):
    """Against a set of the slots that are taken."""

    areas = Bundle("areas")

    @initialize(num_slots=st.integers(1, 600), low=st.integers(0, 4), extra=st.integers(0, 5))
    def start(self, num_slots: int, low: int, extra: int) -> None:
        self.buddy = BuddyAllocator(num_slots, 1 << low, 1 << (low + extra))
        self.taken: set[int] = set()

    @rule(target=areas, share=st.floats(0, 1))
    def allocate(self, share: float) -> tuple[int, int] | None:
        asked = max(1, round(share * self.buddy.max_size))
        size = self.buddy.size_for(asked)
        start = self.buddy.allocate(asked)
        places = [
            s
            for s in range(0, self.buddy.num_slots - size + 1, size)
            if not self.taken & set(range(s, s + size))
        ]
        if start is None:
            # With everything merged, what is aligned and free is also found.
            assert not places
            return None
        assert start in places
        assert size >= asked
        self.taken |= set(range(start, start + size))
        return start, size

    @rule(area=consumes(areas))
    def free(self, area: tuple[int, int] | None) -> None:
        if area is not None:
            self.buddy.free(area[0])
            self.taken -= set(range(area[0], sum(area)))

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "buddy"):
            self.buddy.check_invariants()
            assert self.buddy.num_free_slots == self.buddy.num_slots - len(self.taken)
            assert sum(self.buddy.areas.values()) == len(self.taken)


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
