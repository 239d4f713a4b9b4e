"""The choice between swapping and computing again."""

import pytest

from jpaged.preemption import PreemptionPolicy


@pytest.mark.parametrize(("mode", "swaps"), [("recompute", False), ("swap", True)])
def test_a_fixed_mode_looks_at_no_costs(mode, swaps):
    policy = PreemptionPolicy(mode)
    policy.note_copies(1, 1.0)
    policy.note_prefill(1, 1.0)
    for arguments in ((1, 1, 1), (4, 1000, 1), (1, 1, 1000)):
        assert policy.prefers_swap(*arguments) is swaps


def test_groups_of_several_sequences_are_swapped():
    policy = PreemptionPolicy("auto")
    policy.note_copies(1, 1e9)
    policy.note_prefill(1, 1e-9)
    assert policy.prefers_swap(2, 10, 100)
    assert not policy.prefers_swap(1, 10, 100)


def test_what_is_cheaper_is_chosen_once_both_costs_are_known():
    policy = PreemptionPolicy("auto")
    assert policy.prefers_swap(1, 10, 100), "tried, to learn what it costs"
    policy.note_copies(4, 0.04)
    assert policy.prefers_swap(1, 10, 100)
    policy.note_prefill(100, 0.1)
    assert (policy.seconds_per_block, policy.seconds_per_token) == (0.01, 0.001)
    # 2 x 10 blocks x 10 ms against 1 ms a token.
    assert not policy.prefers_swap(1, 10, 199)
    assert policy.prefers_swap(1, 10, 201)


def test_costs_follow_what_is_measured():
    policy = PreemptionPolicy("auto")
    policy.note_prefill(10, 10.0)
    for _ in range(60):
        policy.note_prefill(100, 0.1)
    assert policy.seconds_per_token == pytest.approx(0.001, rel=0.01)
