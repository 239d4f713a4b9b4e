"""The scheduler by example: order, budgets, admission, preemption, endings."""

import itertools
from typing import Any

import pytest

from jpaged.block_manager import BlockManager
from jpaged.config import SchedulerConfig
from jpaged.request import Request, Sequence, SequenceStatus
from jpaged.sampling_params import SamplingParams
from jpaged.scheduler import Scheduler
from jpaged.scheduler_output import SchedulerOutput

BLOCK_SIZE = 4


def make_scheduler(num_blocks: int = 100, caching: bool = True, **config) -> Scheduler:
    defaults: dict[str, Any] = {
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
    }
    manager = BlockManager(num_blocks, BLOCK_SIZE, caching)
    return Scheduler(SchedulerConfig(**(defaults | config)), manager)


def add(
    scheduler: Scheduler,
    name: str,
    num_prompt_tokens: int,
    max_tokens: int | None = 8,
    n: int = 1,
    priority: int = 0,
    awaits_tokens: bool = False,
) -> Request:
    """Adds a request whose prompt shares nothing with those of other names."""
    prompt = [1000 * ord(name) + i for i in range(num_prompt_tokens)]
    params = SamplingParams(n=n, max_tokens=max_tokens)
    request = Request(name, prompt, params, priority=priority, awaits_tokens=awaits_tokens)
    scheduler.add_request(request)
    scheduler.check_invariants()
    return request


def schedule(scheduler: Scheduler) -> SchedulerOutput:
    output = scheduler.schedule()
    scheduler.check_invariants()
    assert output.num_batched_tokens <= scheduler.config.max_num_batched_tokens
    assert output.num_batched_tokens == sum(output.num_scheduled_tokens)
    assert all(n == 1 for n in output.num_scheduled_tokens[: output.num_decodes])
    for before, after in itertools.pairwise(range(output.num_decodes, len(output.seqs))):
        # Behind the decodes only a prompt that others fork from has a single token.
        if output.num_scheduled_tokens[before] == 1:
            assert output.num_scheduled_tokens[after] == 0
    assert output.num_scheduled_tokens[-1:] != [1] or output.num_decodes == len(output.seqs)
    assert len(output.block_copies) <= len(output.seqs)
    lengths = map(len, (output.seqs, output.starts, output.samples, output.uses_pending))
    assert set(lengths) == {len(output.num_scheduled_tokens)}
    return output


def receive(scheduler: Scheduler, output: SchedulerOutput, token_id: int = 7) -> None:
    """Does what the engine does with the tokens of a step, for requests that only end by length."""
    for seq, samples in zip(output.seqs, output.samples, strict=True):
        if samples and scheduler.append_token(seq, token_id + seq.seq_index):
            if len(seq.token_ids) >= seq.max_length:
                scheduler.finish_sequence(seq, "length")
            scheduler.check_invariants()


def step(scheduler: Scheduler) -> SchedulerOutput:
    output = schedule(scheduler)
    receive(scheduler, output)
    return output


def names(seqs: list[Sequence]) -> list[str]:
    return [seq.request.request_id for seq in seqs]


def what(output: SchedulerOutput) -> list[tuple[str, int, int, bool]]:
    return list(
        zip(
            names(output.seqs),
            output.starts,
            output.num_scheduled_tokens,
            output.samples,
            strict=True,
        )
    )


def test_decodes_come_first_then_chunks():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add(scheduler, "a", 5)
    assert what(step(scheduler)) == [("a", 0, 5, True)]
    add(scheduler, "b", 12)
    assert what(step(scheduler)) == [("a", 5, 1, True), ("b", 0, 9, False)]
    output = step(scheduler)
    assert what(output) == [("a", 6, 1, True), ("b", 9, 3, True)]
    assert what(step(scheduler)) == [("a", 7, 1, True), ("b", 12, 1, True)]


def test_single_token_chunk_is_placed_with_the_decodes_and_may_not_sample():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, "a", 7)
    add(scheduler, "b", 9)
    assert what(schedule(scheduler)) == [("b", 0, 1, False), ("a", 0, 7, True)]


def test_older_prompt_does_not_take_the_decodes_budget():
    scheduler = make_scheduler(max_num_batched_tokens=8, long_prefill_token_threshold=4)
    add(scheduler, "a", 30)
    add(scheduler, "b", 4)
    assert what(step(scheduler)) == [("a", 0, 4, False), ("b", 0, 4, True)]
    assert what(step(scheduler)) == [("b", 4, 1, True), ("a", 4, 4, False)]
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, "b", 4)
    step(scheduler)
    add(scheduler, "a", 30)
    assert what(step(scheduler)) == [("b", 4, 1, True), ("a", 0, 7, False)]


def test_decode_of_an_unread_token_takes_it_on_the_device():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 5, max_tokens=3)
    seq = request.sequences[0]
    first = schedule(scheduler)
    assert (first.uses_pending, seq.num_pending) == ([False], 1)
    second = schedule(scheduler)
    assert (what(second), second.uses_pending) == ([("a", 5, 1, True)], [True])
    assert seq.num_pending == 2
    receive(scheduler, first)
    third = schedule(scheduler)
    assert (what(third), third.uses_pending) == ([("a", 6, 1, True)], [True])
    receive(scheduler, second)
    # Three tokens are sampled, known or not: that is max_tokens.
    assert schedule(scheduler).is_empty
    receive(scheduler, third)
    assert (seq.num_output_tokens, seq.finish_reason) == (3, "length")
    assert not scheduler.has_unfinished()


def test_sequence_that_awaits_its_token_leaves_out_the_steps_before_it_comes():
    scheduler = make_scheduler()
    add(scheduler, "a", 3, awaits_tokens=True)
    add(scheduler, "b", 2)
    first = schedule(scheduler)
    assert names(first.seqs) == ["a", "b"]
    second = schedule(scheduler)
    assert names(second.seqs) == ["b"]
    receive(scheduler, first)
    third = schedule(scheduler)
    assert (names(third.seqs), third.uses_pending) == (["a", "b"], [False, True])
    for output in (second, third):
        receive(scheduler, output)


def test_nothing_is_scheduled_while_all_await_their_tokens():
    scheduler = make_scheduler()
    add(scheduler, "a", 3, n=2, awaits_tokens=True)
    first = schedule(scheduler)
    assert schedule(scheduler).is_empty
    receive(scheduler, first)
    assert names(schedule(scheduler).seqs) == ["a", "a"]


def test_decode_of_a_read_token_comes_from_the_host():
    scheduler = make_scheduler()
    add(scheduler, "a", 5)
    step(scheduler)
    assert step(scheduler).uses_pending == [False]


def test_max_model_len_ends_a_sequence_without_max_tokens():
    scheduler = make_scheduler(max_model_len=10)
    request = add(scheduler, "a", 7, max_tokens=None)
    outputs = [schedule(scheduler) for _ in range(4)]
    assert [len(output.seqs) for output in outputs] == [1, 1, 1, 0]
    for output in outputs:
        receive(scheduler, output)
    assert len(request.sequences[0].token_ids) == 10


def test_rows_are_held_while_running_and_handed_on():
    scheduler = make_scheduler(max_num_seqs=2)
    a, b, c = (add(scheduler, name, 5) for name in "abc")
    output = step(scheduler)
    assert names(output.admitted) == ["a", "b"]
    rows = [request.sequences[0].row for request in (a, b, c)]
    assert (set(rows[:2]), rows[2]) == ({0, 1}, None)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    scheduler.finish_sequence(b.sequences[0], "stop", stop_reason=7)
    assert (b.sequences[0].row, b.sequences[0].stop_reason) == (None, 7)
    output = step(scheduler)
    assert names(output.admitted) == ["c"]
    assert c.sequences[0].row == rows[1]


def test_group_is_admitted_whole_and_nobody_overtakes_it():
    scheduler = make_scheduler(max_num_seqs=4)
    add(scheduler, "a", 5, n=2)
    b = add(scheduler, "b", 5, n=3)
    add(scheduler, "c", 5)
    assert names(step(scheduler).admitted) == ["a", "a"]
    assert names(step(scheduler).admitted) == []
    scheduler.abort_request("a")
    assert names(step(scheduler).admitted) == ["b", "b", "b", "c"]
    assert [seq.seq_index for seq in b.unfinished] == [0, 1, 2]


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_fork_from_the_prompt_and_copy_its_last_block_on_their_first_write(caching):
    scheduler = make_scheduler(caching=caching)
    request = add(scheduler, "a", 10, n=3)
    output = step(scheduler)
    assert what(output) == [("a", 0, 10, True), ("a", 10, 0, True), ("a", 10, 0, True)]
    assert [seq.seq_index for seq in output.seqs] == [0, 1, 2]
    assert (output.num_decodes, output.num_batched_tokens, output.block_copies) == (0, 10, [])
    tables = [list(seq.block_ids) for seq in request.sequences]
    assert tables[0] == tables[1] == tables[2]
    assert [seq for seq, first in output.table_updates if first == 0] == request.sequences
    assert [seq.num_cached_tokens for seq in request.sequences] == [0, 0, 0]
    stats = scheduler.stats()
    assert (stats.blocks.used, stats.blocks.shared, stats.blocks.saved) == (3, 3, 6)
    assert (stats.num_prefill_tokens, stats.blocks.prefix_queried_tokens) == (10, 10)

    output = step(scheduler)
    assert what(output) == [("a", 10, 1, True)] * 3
    old = tables[0][2]
    new = [seq.block_ids[2] for seq in request.sequences]
    # Whoever writes last is the only owner by then.
    assert (new[2], output.block_copies) == (old, [(old, new[0]), (old, new[1])])
    assert [seq.block_ids[:2] for seq in request.sequences] == [tables[0][:2]] * 3
    assert (scheduler.stats().blocks.used, scheduler.stats().blocks.copies) == (5, 2)
    assert step(scheduler).block_copies == []


def test_siblings_of_a_prompt_that_ends_with_a_block_copy_nothing():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 8, n=3)
    step(scheduler)
    output = step(scheduler)
    assert output.block_copies == []
    assert len({seq.block_ids[2] for seq in request.sequences}) == 3
    assert scheduler.stats().blocks.used == 5


def test_siblings_wait_for_a_prompt_in_several_chunks():
    for caching in (True, False):
        scheduler = make_scheduler(caching=caching, long_prefill_token_threshold=8)
        add(scheduler, "a", 18, n=2)
        assert what(step(scheduler)) == [("a", 0, 8, False)]
        assert what(step(scheduler)) == [("a", 8, 8, False)]
        assert what(step(scheduler)) == [("a", 16, 2, True), ("a", 18, 0, True)]
        assert what(step(scheduler)) == [("a", 18, 1, True)] * 2


def test_chunk_of_one_token_that_others_fork_from_is_no_decode():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add(scheduler, "b", 2)
    step(scheduler)
    add(scheduler, "a", 10, n=2)
    assert what(step(scheduler)) == [("b", 2, 1, True), ("a", 0, 9, False)]
    add(scheduler, "c", 1)
    output = step(scheduler)
    expected = [("b", 3, 1, True), ("c", 0, 1, True), ("a", 9, 1, True), ("a", 10, 0, True)]
    assert (what(output), output.num_decodes) == (expected, 2)


def test_tokens_of_siblings_are_taken_on_the_device_in_the_next_step():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 10, n=2, max_tokens=3)
    first, second = schedule(scheduler), schedule(scheduler)
    assert (what(second), second.uses_pending) == ([("a", 10, 1, True)] * 2, [True, True])
    receive(scheduler, first)
    assert [seq.num_output_tokens for seq in request.sequences] == [1, 1]
    third = schedule(scheduler)
    for output in (second, third):
        receive(scheduler, output)
    assert [seq.num_output_tokens for seq in request.sequences] == [3, 3]
    assert scheduler.stats().blocks.used == 0


def test_siblings_of_one_token_never_write():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 10, n=4, max_tokens=1)
    assert len(step(scheduler).seqs) == 4
    assert request.is_finished
    assert (scheduler.stats().blocks.used, scheduler.stats().blocks.copies) == (0, 0)


@pytest.mark.parametrize("caching", [True, False])
def test_next_sibling_computes_the_prompt_when_the_first_ends_before_it_is_through(caching):
    scheduler = make_scheduler(caching=caching, long_prefill_token_threshold=8)
    request = add(scheduler, "a", 18, n=3)
    step(scheduler)
    assert scheduler.finish_sequence(request.sequences[0], "abort")
    start = 8 if caching else 0
    assert what(step(scheduler))[0] == ("a", start, 8, False)
    outputs = [step(scheduler) for _ in range(2)]
    forks = next(output for output in outputs if output.samples[:1] == [True])
    assert [seq.seq_index for seq in forks.seqs] == [1, 2]


def test_sibling_that_ends_before_the_fork_takes_no_part_in_it():
    scheduler = make_scheduler(long_prefill_token_threshold=8)
    request = add(scheduler, "a", 10, n=3)
    step(scheduler)
    scheduler.finish_sequence(request.sequences[1], "abort")
    assert [seq.seq_index for seq in step(scheduler).seqs] == [0, 2]
    scheduler.finish_sequence(request.sequences[2], "abort")
    output = step(scheduler)
    assert (what(output), output.block_copies) == ([("a", 10, 1, True)], [])


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_prompt_tokens", [2, 4, 10, 12])
def test_preempted_group_computes_its_prompt_once_again(caching, num_prompt_tokens):
    scheduler = make_scheduler(caching=caching)
    request = add(scheduler, "a", num_prompt_tokens, n=3, max_tokens=20)
    for _ in range(6):
        step(scheduler)
    scheduler.block_manager.pool.clear_cache()
    scheduler._preempt_last()
    scheduler.check_invariants()
    num_computed = scheduler.num_prefill_tokens
    output = step(scheduler)
    num_shared = num_prompt_tokens // BLOCK_SIZE * BLOCK_SIZE
    num_known = num_prompt_tokens + 6
    expected = [("a", start, num_known - start, True) for start in (0, num_shared, num_shared)]
    assert what(output) == expected
    assert scheduler.num_prefill_tokens - num_computed == 3 * num_known - 2 * num_shared
    tables = [seq.block_ids[: num_shared // BLOCK_SIZE] for seq in request.sequences]
    assert tables[0] == tables[1] == tables[2]
    while scheduler.has_unfinished():
        step(scheduler)
    assert scheduler.stats().blocks.used == 0


def test_sibling_starts_from_whoever_has_the_prompt():
    scheduler = make_scheduler(caching=False, max_num_batched_tokens=20)
    request = add(scheduler, "a", 10, n=3, max_tokens=30)
    for _ in range(3):
        step(scheduler)
    scheduler._preempt_last()
    # The second waits for the budget; the first has ended when it gets some.
    assert what(step(scheduler)) == [("a", 0, 13, True), ("a", 8, 5, True), ("a", 8, 2, False)]
    scheduler.finish_sequence(request.sequences[0], "stop")
    assert what(step(scheduler)) == [("a", 13, 1, True), ("a", 10, 3, True)]
    assert request.sequences[1].block_ids[:2] == request.sequences[2].block_ids[:2]


def test_group_prefers_its_own_blocks_to_cached_ones_of_equal_content():
    """Else it would hold its prompt twice, which admission does not reckon with."""
    scheduler = make_scheduler(num_blocks=9)
    prompt = list(range(12))
    scheduler.add_request(Request("b", prompt, SamplingParams(max_tokens=1)))
    step(scheduler)
    params = SamplingParams(n=2, max_tokens=9)
    request = Request("a", prompt, params, skip_prefix_cache=True)
    scheduler.add_request(request)
    for _ in range(3):
        step(scheduler)
    scheduler._preempt_last()
    output = step(scheduler)
    assert what(output) == [("a", 0, 15, True), ("a", 12, 3, True)]
    assert request.sequences[0].block_ids[:3] == request.sequences[1].block_ids[:3]
    while scheduler.has_unfinished():
        step(scheduler)
    assert [seq.num_output_tokens for seq in request.sequences] == [9, 9]


def test_prompt_seen_before_is_computed_from_its_last_block_on():
    scheduler = make_scheduler()
    add(scheduler, "a", 8)
    step(scheduler)
    scheduler.abort_request("a")
    add(scheduler, "a", 8)
    # Fully cached, but a token is needed to sample from: its block is computed again.
    assert what(step(scheduler)) == [("a", 4, 4, True)]


def test_tables_are_reported_from_the_first_new_block():
    scheduler = make_scheduler(max_num_batched_tokens=9)
    a = add(scheduler, "a", 15).sequences[0]
    assert step(scheduler).table_updates == [(a, 0)]
    assert step(scheduler).table_updates == [(a, 2)]
    assert step(scheduler).table_updates == []
    assert step(scheduler).table_updates == [(a, 4)]
    assert len(a.block_ids) == 5


def test_newest_group_is_preempted_whole_and_comes_back_first():
    scheduler = make_scheduler(num_blocks=8, caching=False, max_num_seqs=4, admission_watermark=0.0)
    a = add(scheduler, "a", 7, max_tokens=16).sequences[0]
    b = add(scheduler, "b", 7, max_tokens=9, n=2)
    add(scheduler, "c", 2)
    assert names(step(scheduler).admitted) == ["a", "b", "b", "c"]
    add(scheduler, "d", 2)
    step(scheduler)
    # a and both of b need a block and one is free: c's goes to the first of b, the other stalls.
    output = step(scheduler)
    assert (names(output.preempted), output.admitted) == (["c"], [])
    assert (names(output.seqs), [seq.seq_index for seq in output.seqs]) == (["a", "b"], [0, 0])
    preempted = [names(step(scheduler).preempted) for _ in range(4)]
    assert preempted == [[], [], [], ["b", "b"]]
    assert [seq.status for seq in b.sequences] == [SequenceStatus.PREEMPTED] * 2
    assert [seq.num_output_tokens for seq in b.sequences] == [6, 2]
    assert (scheduler.num_preemptions, b.sequences[0].num_preemptions) == (3, 1)
    admitted = []
    while scheduler.has_unfinished():
        output = step(scheduler)
        admitted += names(output.admitted)
        if "b" in names(output.admitted):
            assert a.is_finished
            # Known output is computed again, and the prompt once: its full block is shared.
            assert what(output)[:2] == [("b", 0, 13, True), ("b", 4, 5, True)]
    assert admitted == ["b", "b", "c", "d"]
    assert [seq.num_output_tokens for seq in b.sequences] == [9, 9]
    assert scheduler.stats().blocks.used == 0


def test_token_of_a_step_in_flight_reaches_a_preempted_sequence_before_it_runs_again():
    scheduler = make_scheduler(num_blocks=4, caching=False)
    a = add(scheduler, "a", 3, max_tokens=7).sequences[0]
    b = add(scheduler, "b", 4, max_tokens=4).sequences[0]
    first = schedule(scheduler)
    second = schedule(scheduler)  # b takes the last free block.
    assert (names(second.seqs), scheduler.block_manager.num_free_blocks) == (["a", "b"], 0)
    receive(scheduler, first)
    third = schedule(scheduler)  # a needs a block.
    assert (names(third.seqs), names(third.preempted)) == (["a"], ["b"])
    assert (b.num_pending, b.row, b.length) == (1, None, 6)
    scheduler.finish_sequence(a, "stop")
    # There is room for b now, but its token has not arrived.
    assert schedule(scheduler).is_empty
    receive(scheduler, second)
    assert (b.num_pending, b.num_output_tokens) == (0, 2)
    assert what(schedule(scheduler)) == [("b", 0, 6, True)]


def test_last_group_stalls_rather_than_preempt_itself():
    scheduler = make_scheduler(num_blocks=4, caching=False, admission_watermark=0.0)
    a = add(scheduler, "a", 4, max_tokens=4).sequences[0]
    b = add(scheduler, "b", 4, max_tokens=2).sequences[0]
    add(scheduler, "c", 1)
    assert names(step(scheduler).seqs) == ["c", "a", "b"]
    output = step(scheduler)
    # Two need a block, none is left; c makes room for a, and b, now last, waits with what it has.
    assert (names(output.seqs), names(output.preempted)) == (["a"], ["c"])
    assert (len(a.block_ids), len(b.block_ids), b.status) == (2, 1, SequenceStatus.RUNNING)
    output = step(scheduler)
    assert (names(output.seqs), output.preempted, output.admitted) == (["a"], [], [])
    assert names(step(scheduler).seqs) == ["a"]
    assert a.is_finished
    assert names(step(scheduler).seqs) == ["b", "c"]
    assert b.is_finished


def test_admission_leaves_the_watermark_unless_nothing_runs():
    scheduler = make_scheduler(num_blocks=11, admission_watermark=0.2)
    add(scheduler, "a", 20)
    add(scheduler, "b", 13)
    add(scheduler, "c", 1)
    # Five blocks are left after a: b's four would leave fewer than two; c does not overtake it.
    assert names(step(scheduler).admitted) == ["a"]
    scheduler.abort_request("b")
    assert names(step(scheduler).admitted) == ["c"]
    scheduler = make_scheduler(num_blocks=11, admission_watermark=0.2)
    add(scheduler, "a", 39, max_tokens=2)
    assert names(step(scheduler).admitted) == ["a"]


def test_admission_wants_room_for_the_whole_prompt():
    scheduler = make_scheduler(num_blocks=11, max_num_batched_tokens=8, admission_watermark=0.0)
    add(scheduler, "a", 4)
    add(scheduler, "b", 40, max_tokens=1)
    assert names(step(scheduler).admitted) == ["a"]


def test_blocks_of_others_that_a_prompt_hits_need_no_room():
    scheduler = make_scheduler(num_blocks=9, admission_watermark=0.0)
    prompt = list(range(20))
    for name in "ab":
        scheduler.add_request(Request(name, prompt, SamplingParams(max_tokens=4)))
    output = step(scheduler)
    assert what(output) == [("a", 0, 20, True), ("b", 16, 4, True)]
    assert scheduler.stats().blocks.used == 6


def test_priority_orders_admission_and_chooses_the_victim():
    scheduler = make_scheduler(
        num_blocks=5, caching=False, policy="priority", max_num_seqs=3, admission_watermark=0.0
    )
    add(scheduler, "a", 4, priority=1)
    add(scheduler, "b", 3, priority=2)
    add(scheduler, "c", 3, priority=0)
    add(scheduler, "d", 3, priority=0)
    assert names(step(scheduler).admitted) == ["c", "d", "a"]
    output = step(scheduler)  # a takes the last free block.
    assert (names(output.seqs), output.preempted) == (["c", "d", "a"], [])
    output = step(scheduler)
    assert (names(output.seqs), names(output.preempted)) == (["c", "d"], ["a"])


def test_late_arrival_of_high_priority_runs_in_its_place():
    scheduler = make_scheduler(policy="priority")
    for name, priority in (("a", 1), ("b", 1), ("c", 0), ("d", 2)):
        add(scheduler, name, 2, priority=priority)
        step(scheduler)
    assert names(step(scheduler).seqs) == ["c", "a", "b", "d"]


@pytest.mark.parametrize(
    ("num_prompt_tokens", "params", "message"),
    [
        (0, {}, "prompt must have at least 1 token, got 0"),
        (64, {}, "prompt must have fewer than max_model_len=64 tokens.* got 64"),
        (4, {"n": 9}, r"n must be in \[1, max_num_seqs=8\], got 9"),
        (
            30,
            {"max_tokens": 12},
            "may need 11 blocks .1 sequences of up to 42 tokens.*pool has 10 of 4 tokens; enlarge",
        ),
        (30, {"max_tokens": None}, "may need 16 blocks .*lower max_tokens, n or max_model_len"),
        (
            5,
            {"max_tokens": 8, "n": 5},
            "may need 11 blocks .5 sequences of up to 13 tokens that share 1.*pool has 10 of 4",
        ),
    ],
)
def test_request_that_can_never_run_is_refused_at_once(num_prompt_tokens, params, message):
    scheduler = make_scheduler(num_blocks=11)
    request = Request("a", list(range(num_prompt_tokens)), SamplingParams(**params))
    with pytest.raises(ValueError, match=message):
        scheduler.add_request(request)
    assert not scheduler.has_unfinished()
    scheduler.check_invariants()


class NoTokens:
    n = 1
    max_tokens = 0


def test_request_for_no_tokens_is_refused():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        make_scheduler().add_request(Request("a", [1], NoTokens()))


def test_id_in_use_is_refused_and_free_again_afterwards():
    scheduler = make_scheduler()
    add(scheduler, "a", 4)
    with pytest.raises(ValueError, match="request_id 'a' is already in use"):
        add(scheduler, "a", 4)
    scheduler.abort_request("a")
    add(scheduler, "a", 4)
    assert scheduler.get_request("a") is not None
    assert scheduler.get_request("b") is None


def test_request_that_just_fits_runs_to_its_end_alone():
    scheduler = make_scheduler(num_blocks=11, caching=False)
    request = add(scheduler, "a", 29, max_tokens=12)
    other = add(scheduler, "b", 5, max_tokens=2, n=4)
    while scheduler.has_unfinished():
        step(scheduler)
    assert request.sequences[0].num_output_tokens == 12
    assert [seq.num_output_tokens for seq in other.sequences] == [2] * 4


def test_abort_frees_everything_at_once_wherever_the_request_is():
    scheduler = make_scheduler(max_num_seqs=2)
    running = add(scheduler, "a", 20, n=2)
    waiting = add(scheduler, "b", 5)
    output = schedule(scheduler)
    assert scheduler.abort_request("b")
    assert scheduler.abort_request("a")
    scheduler.check_invariants()
    assert not scheduler.abort_request("a")
    assert not scheduler.abort_request("never seen")
    assert (running.is_finished, waiting.is_finished) == (True, True)
    assert {seq.finish_reason for seq in running.sequences} == {"abort"}
    stats = scheduler.stats()
    assert (stats.blocks.used, stats.num_running, stats.num_running_seqs) == (0, 0, 0)
    # The step in flight returns to nobody.
    assert not scheduler.append_token(output.seqs[0], 7)
    assert running.sequences[0].num_output_tokens == 0
    assert schedule(scheduler).is_empty


def test_abort_of_a_preempted_request():
    scheduler = make_scheduler(num_blocks=4, caching=False, admission_watermark=0.0)
    add(scheduler, "a", 4)
    add(scheduler, "b", 4)
    add(scheduler, "c", 4)
    step(scheduler)
    assert names(step(scheduler).preempted) == ["c"]
    assert scheduler.abort_request("c")
    scheduler.check_invariants()
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 2)


def test_flood_of_aborted_requests_leaves_no_trace():
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, "z", 4)
    step(scheduler)
    for i in range(200):
        scheduler.add_request(Request(str(i), [1, 2], SamplingParams()))
    for i in range(199):
        scheduler.abort_request(str(i))
    scheduler.check_invariants()
    assert scheduler.num_waiting == 1
    assert len(scheduler._waiting) < 20
    scheduler.abort_request("z")
    assert names(step(scheduler).admitted) == ["199"]


def test_group_goes_on_when_one_of_its_sequences_ends():
    scheduler = make_scheduler(num_blocks=10, caching=False, max_num_seqs=3)
    request = add(scheduler, "a", 5, n=3)
    step(scheduler)
    assert scheduler.finish_sequence(request.sequences[1], "stop")
    assert not scheduler.finish_sequence(request.sequences[1], "length")
    assert request.sequences[1].finish_reason == "stop"
    assert [seq.seq_index for seq in step(scheduler).seqs] == [0, 2]
    add(scheduler, "b", 1)
    assert names(step(scheduler).admitted) == ["b"]


@pytest.mark.parametrize("num_output_tokens", range(1, 10))
def test_last_write_of_a_finished_sequence_never_falsifies_a_cached_block(num_output_tokens):
    """The step in flight when a sequence ends still writes the K and V of its last token."""
    scheduler = make_scheduler()
    seq = add(scheduler, "a", 6, max_tokens=20).sequences[0]
    in_flight = schedule(scheduler)
    for number in range(num_output_tokens):
        before, in_flight = in_flight, schedule(scheduler)
        assert before.seqs == in_flight.seqs == [seq]
        scheduler.append_token(seq, 50 + number)
    position = in_flight.starts[0]
    block_id = seq.block_ids[position // BLOCK_SIZE]
    known = list(seq.token_ids)
    scheduler.finish_sequence(seq, "stop")
    scheduler.check_invariants()
    assert position == len(known) - 1
    block = scheduler.block_manager.pool.blocks[block_id]
    assert (block.block_hash is not None) == (position % BLOCK_SIZE == BLOCK_SIZE - 1)
    if block.block_hash is not None:
        # Full with that very token: the block stands for the known tokens up to it.
        follower = Request("b", [*known, 1], SamplingParams()).sequences[0]
        assert scheduler.block_manager.get_cached_prefix(follower)[-1] == block_id


def test_stats_see_running_waiting_and_waste():
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, "a", 5, n=2)
    add(scheduler, "b", 5)
    step(scheduler)
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_running_seqs, stats.num_waiting) == (1, 2, 1)
    assert (stats.num_steps, stats.num_preemptions) == (1, 0)
    assert (stats.blocks.used, stats.blocks.shared, stats.blocks.wasted_slots) == (2, 2, 3)
    make_scheduler().schedule()


def test_empty_steps_are_not_counted():
    scheduler = make_scheduler()
    assert schedule(scheduler).is_empty
    assert scheduler.num_steps == 0


def test_token_that_nobody_sampled_is_a_bug():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 5)
    with pytest.raises(AssertionError, match="no step sampled"):
        scheduler.append_token(request.sequences[0], 1)


def lose_row(scheduler: Scheduler, seq: Sequence) -> None:
    seq.row = None


def miscount_running(scheduler: Scheduler, seq: Sequence) -> None:
    scheduler._num_running = 5


def miscount_waiting(scheduler: Scheduler, seq: Sequence) -> None:
    scheduler._num_waiting = 5


def miscount_prefill(scheduler: Scheduler, seq: Sequence) -> None:
    scheduler._num_in_prefill = 5


def forget_request(scheduler: Scheduler, seq: Sequence) -> None:
    scheduler._requests.pop("a")


def disorder(scheduler: Scheduler, seq: Sequence) -> None:
    scheduler._running.reverse()


def change_status(scheduler: Scheduler, seq: Sequence) -> None:
    seq.status = SequenceStatus.WAITING


def lose_token(scheduler: Scheduler, seq: Sequence) -> None:
    seq.num_pending = 0


def keep_pending(scheduler: Scheduler, seq: Sequence) -> None:
    seq.in_prefill = True
    scheduler._num_in_prefill += 1


def end_prefill(scheduler: Scheduler, seq: Sequence) -> None:
    keep_pending(scheduler, seq)
    seq.num_pending = 0


def row_while_waiting(scheduler: Scheduler, seq: Sequence) -> None:
    scheduler.get_request("c").sequences[0].row = 1  # pyright: ignore[reportOptionalMemberAccess]


def run_while_waiting(scheduler: Scheduler, seq: Sequence) -> None:
    request = scheduler.get_request("c")
    assert request is not None
    request.sequences[0].status = SequenceStatus.RUNNING


def share_manager(scheduler: Scheduler, seq: Sequence) -> None:
    other = Request("z", [1], SamplingParams()).sequences[0]
    scheduler.block_manager.allocate_slots(other, 1)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lose_row, r"free and held rows != all rows: \[-1, 1\] != \[0, 1\]"),
        (miscount_running, "num_running != running: 5 != 2"),
        (miscount_waiting, "num_waiting != waiting: 5 != 1"),
        (miscount_prefill, "num_in_prefill != counted: 5 != 0"),
        (forget_request, r"requests != running and waiting: \['b', 'c'\] != \['a', 'b', 'c'\]"),
        (disorder, "order of running != sorted"),
        (change_status, "running request, but Sequence.'a'/0, waiting"),
        (lose_token, r"length != computed \+ 1: 5 != 6"),
        (keep_pending, "pending token in prefill"),
        (end_prefill, "prefill is over"),
        (row_while_waiting, r"held while waiting != nothing: \(1, .* != \(None"),
        (run_while_waiting, "waiting, but Sequence.'c'/0, running"),
        (share_manager, "references != of running: 5 != 4"),
    ],
)
def test_check_invariants_notices(corrupt, message):
    scheduler = make_scheduler(max_num_seqs=2)
    request, _, _ = (add(scheduler, name, 5) for name in "abc")
    schedule(scheduler)
    corrupt(scheduler, request.sequences[0])
    with pytest.raises(AssertionError, match=message):
        scheduler.check_invariants()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_model_len": 1}, "max_model_len must be an integer of at least 2, got 1"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1, got 0"),
        ({"max_num_batched_tokens": 1.5}, "max_num_batched_tokens must be an integer .* got 1.5"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold must .* got -1"),
        (
            {"max_num_seqs": 8, "max_num_batched_tokens": 7},
            "max_num_batched_tokens must be at least max_num_seqs, .*_tokens=7, max_num_seqs=8",
        ),
        ({"policy": "lifo"}, r"policy must be one of \('fcfs', 'priority'\), got 'lifo'"),
        ({"admission_watermark": 1.0}, r"admission_watermark must be in \[0, 1\), got 1.0"),
    ],
)
def test_scheduler_config_checks_its_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**({"max_model_len": 64} | fields))
