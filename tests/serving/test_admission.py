"""The queue in front of the engine, against what it promises."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jpaged.errors import QueueFullError
from jpaged.serving.admission import AdmissionQueue

KEYS = st.sampled_from([None, "a", "b", "c"])


def _fill(queue, key, count, *, cost=10, priority=0):
    return [
        queue.put((key, i), key=key, priority=priority, cost=cost, num_tokens=1)
        for i in range(count)
    ]


def _drain(queue):
    found = []
    while (ticket := queue.take()) is not None:
        found.append(ticket.item)
    return found


def test_one_key_is_served_in_order_of_arrival():
    queue = AdmissionQueue()
    _fill(queue, "a", 5)
    assert _drain(queue) == [("a", i) for i in range(5)]
    assert queue.take() is None


def test_lower_priorities_come_first_and_then_arrival():
    queue = AdmissionQueue()
    for name, priority in (("x", 1), ("y", 0), ("z", 1), ("w", -1)):
        queue.put(name, priority=priority, cost=1, num_tokens=1)
    assert _drain(queue) == ["w", "y", "x", "z"]


def test_ten_thousand_requests_of_one_key_do_not_hold_up_another():
    queue = AdmissionQueue()
    _fill(queue, "greedy", 10_000)
    for _ in range(100):
        queue.take()
    _fill(queue, "modest", 3)
    found = [ticket.item for ticket in (queue.take() for _ in range(7)) if ticket is not None]
    assert [item for item in found if item[0] == "modest"] == [("modest", i) for i in range(3)]


def test_shares_are_of_tokens_not_of_requests():
    queue = AdmissionQueue()
    _fill(queue, "long", 100, cost=90)
    _fill(queue, "short", 100, cost=10)
    taken = collections.Counter()
    for _ in range(50):
        ticket = queue.take()
        assert ticket is not None
        taken[ticket.key] += ticket.cost
    assert abs(taken["long"] - taken["short"]) <= 100


def test_being_away_saves_up_no_turns():
    queue = AdmissionQueue()
    _fill(queue, "away", 1)
    _fill(queue, "busy", 100)
    for _ in range(60):
        queue.take()
    _fill(queue, "away", 20)
    found = [ticket.key for ticket in (queue.take() for _ in range(10)) if ticket is not None]
    assert 4 <= found.count("away") <= 6


def test_a_cancelled_one_is_gone_at_once_and_once():
    queue = AdmissionQueue(max_requests=2)
    first, second = _fill(queue, "a", 2)
    with pytest.raises(QueueFullError, match="max_num_queued_reqs=2 requests are waiting"):
        queue.check_room()
    assert queue.cancel(first)
    assert not queue.cancel(first)
    queue.check_room()
    assert _drain(queue) == [("a", 1)]
    assert not queue.cancel(second), "it waits no longer"


def test_limits_count_what_is_about_to_come():
    queue = AdmissionQueue(max_requests=3)
    _fill(queue, None, 1)
    queue.check_room(num_more=1)
    with pytest.raises(QueueFullError):
        queue.check_room(num_more=2)


def test_prompt_tokens_are_limited_but_one_request_may_always_wait():
    queue = AdmissionQueue(max_tokens=10)
    queue.check_room(50)
    queue.put("x", cost=60, num_tokens=8)
    queue.check_room(2)
    with pytest.raises(
        QueueFullError, match=r"8 prompt tokens .* max_num_queued_tokens=10"
    ) as full:
        queue.check_room(3)
    assert full.value.retry_after_s >= 1


def test_cancelled_ones_are_not_kept_for_ever():
    queue = AdmissionQueue()
    keep = _fill(queue, "a", 1)
    for _ in range(1000):
        for ticket in _fill(queue, "a", 1) + _fill(queue, "b", 1):
            queue.cancel(ticket)
    assert len(queue._lines["a"].heap) < 20
    assert len(queue._turns) < 50
    assert _drain(queue) == [keep[0].item]


def test_many_keys_are_not_kept_for_ever():
    queue = AdmissionQueue()
    _fill(queue, "always", 2000, cost=5)
    for i in range(1000):
        _fill(queue, f"k{i}", 1, cost=5)
        queue.take()
        queue.take()
    assert len(queue._clocks) < 100


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=60),
    st.integers(0, 60),
)
def test_keys_that_wait_all_the_time_get_the_same_share(requests, num_taken):
    """At any moment, of any two keys that have waited from the start: at most one request apart."""
    queue = AdmissionQueue()
    for key, cost in requests:
        queue.put(key, key=key, cost=cost, num_tokens=1)
    left = collections.Counter(key for key, _ in requests)
    served = collections.Counter(dict.fromkeys(left, 0))
    most = max(cost for _, cost in requests)
    for _ in range(min(num_taken, len(requests))):
        waiting = [key for key in left if left[key]]
        for key in waiting:
            for other in waiting:
                assert served[key] - served[other] <= most
        ticket = queue.take()
        assert ticket is not None
        served[ticket.key] += ticket.cost
        left[ticket.key] -= 1


class Model(RuleBasedStateMachine):
    """The queue beside a plain list of what waits."""

    def __init__(self):
        super().__init__()
        self.queue = AdmissionQueue()
        self.waiting = []
        self.count = 0

    @rule(key=KEYS, priority=st.integers(-2, 2), cost=st.integers(1, 99), tokens=st.integers(1, 9))
    def put(self, key, priority, cost, tokens):
        self.count += 1
        ticket = self.queue.put(
            (priority, self.count), key=key, priority=priority, cost=cost, num_tokens=tokens
        )
        self.waiting.append(ticket)

    @rule()
    def take(self):
        ticket = self.queue.take()
        if not self.waiting:
            assert ticket is None
            return
        assert ticket is not None
        same_key = [other for other in self.waiting if other.key == ticket.key]
        assert ticket is min(same_key, key=lambda other: other.item), "priority, then arrival"
        self.waiting.remove(ticket)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        ticket = data.draw(st.sampled_from(self.waiting))
        assert self.queue.cancel(ticket)
        self.waiting.remove(ticket)

    @invariant()
    def counts_are_right(self):
        assert self.queue.num_waiting == len(self.waiting)
        assert self.queue.num_tokens == sum(ticket.num_tokens for ticket in self.waiting)
        assert all(ticket.is_waiting for ticket in self.waiting)

    def teardown(self):
        left = _drain(self.queue)
        assert sorted(left) == sorted(ticket.item for ticket in self.waiting)


TestModel = Model.TestCase
