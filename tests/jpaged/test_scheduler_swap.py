"""Preemption by swap as the scheduler sees it, step by step."""

from jpaged.block_manager import BlockManager
from jpaged.config import PreemptionMode, SchedulerConfig
from jpaged.preemption import PreemptionPolicy
from jpaged.request import Request, SequenceStatus
from jpaged.sampling_params import SamplingParams
from jpaged.scheduler import Scheduler

BLOCK_SIZE = 4


def make_scheduler(
    num_blocks=10, num_host_blocks=20, mode: PreemptionMode = "swap", caching=True, **config
):
    manager = BlockManager(num_blocks + 1, BLOCK_SIZE, caching, num_host_blocks=num_host_blocks)
    config = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "admission_watermark": 0.0, **config}
    scheduler_config = SchedulerConfig(max_model_len=40, **config)
    return Scheduler(scheduler_config, manager, PreemptionPolicy(mode))


def add(scheduler, name, num_prompt_tokens, max_tokens=20, n=1):
    first = 100 * len(name) + ord(name[0])
    prompt = list(range(first, first + num_prompt_tokens))
    request = Request(name, prompt, SamplingParams(max_tokens=max_tokens, n=n))
    scheduler.add_request(request)
    return request


def receive(scheduler, output):
    for seq, samples in zip(output.seqs, output.samples, strict=True):
        if samples and scheduler.append_token(seq, 7) and len(seq.token_ids) >= seq.max_length:
            scheduler.finish_sequence(seq, "length")


def step(scheduler):
    output = scheduler.schedule()
    scheduler.check_invariants()
    receive(scheduler, output)
    scheduler.check_invariants()
    return output


def run_until_preempted(scheduler):
    for _ in range(40):
        output = step(scheduler)
        if output.preempted:
            return output
    raise AssertionError("nothing was preempted")


def names(seqs):
    return [seq.request.request_id for seq in seqs]


def test_swapped_group_comes_back_first_and_computes_only_what_is_new():
    scheduler = make_scheduler(caching=False)
    a, b = add(scheduler, "a", 14), add(scheduler, "b", 14)
    output = run_until_preempted(scheduler)
    (seq,) = b.sequences
    assert (names(output.preempted), names(output.seqs)) == (["b"], ["a"])
    assert seq.status is SequenceStatus.SWAPPED
    assert len(output.swap_outs) == len(seq.host_block_ids) == 5
    computed, known = seq.num_computed_tokens, len(seq.token_ids)
    assert known == computed + 1 == 21
    add(scheduler, "c", 2, max_tokens=2)
    admitted = []
    while "b" not in admitted:
        output = step(scheduler)
        admitted += names(output.admitted)
        assert (scheduler.stats().num_swapped == 1) is ("b" not in admitted)
    assert admitted[0] == "b", "nobody who came later goes before it"
    assert a.is_finished
    assert (len(output.swap_ins), output.swap_outs) == (5, [])
    place = output.seqs.index(seq)
    assert (output.starts[place], output.num_scheduled_tokens[place]) == (computed, 1)
    assert (seq, 0) in output.table_updates
    while scheduler.has_unfinished():
        step(scheduler)
    stats = scheduler.stats()
    assert (stats.num_preemptions, stats.num_swaps) == (1, 1)
    # All prompts, and the one token that had not been computed when "b" left.
    assert stats.num_prefill_tokens == 14 + 14 + 2 + 1
    assert (stats.blocks.used, stats.blocks.host_used) == (0, 0)
    assert (stats.blocks.swapped_out, stats.blocks.swapped_in) == (5, 5)


def test_blocks_filled_before_and_after_the_return_are_found_in_the_cache():
    scheduler = make_scheduler(num_blocks=12)
    request = add(scheduler, "a", 10, max_tokens=16)
    step(scheduler)
    scheduler._preempt_last()
    scheduler.block_manager.pool.clear_cache()
    while scheduler.has_unfinished():
        step(scheduler)
    again = Request("b", request.sequences[0].token_ids[:25], SamplingParams(max_tokens=2))
    scheduler.add_request(again)
    step(scheduler)
    assert again.sequences[0].num_cached_tokens == 24


def test_token_that_is_pending_arrives_before_the_group_comes_back():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 6, max_tokens=9, n=2)
    output = scheduler.schedule()
    scheduler._preempt_last()
    scheduler.check_invariants()
    assert scheduler.schedule().is_empty, "its tokens are on the device"
    receive(scheduler, output)
    assert [seq.num_output_tokens for seq in request.sequences] == [1, 1]
    scheduler.check_invariants()
    output = step(scheduler)
    assert (output.starts, output.uses_pending) == ([6, 6], [False, False])


def test_group_may_end_while_it_is_swapped_out():
    scheduler = make_scheduler()
    request = add(scheduler, "a", 6, max_tokens=1, n=3)
    output = scheduler.schedule()
    scheduler._preempt_last()
    assert scheduler.stats().blocks.host_used == 2
    scheduler.finish_sequence(request.sequences[1], "stop")
    scheduler.check_invariants()
    assert scheduler.stats().num_swapped == 2
    receive(scheduler, output)
    assert request.is_finished
    scheduler.schedule()
    scheduler.check_invariants()
    stats = scheduler.stats()
    assert (stats.blocks.host_used, stats.num_swapped, stats.num_waiting) == (0, 0, 0)


def test_group_that_the_host_has_no_room_for_is_computed_again_whole():
    scheduler = make_scheduler(num_host_blocks=3, caching=False)
    request = add(scheduler, "a", 6, max_tokens=9, n=2)
    for _ in range(4):
        step(scheduler)
    assert scheduler.stats().blocks.used == 5
    scheduler._preempt_last()
    scheduler.check_invariants()
    assert {seq.status for seq in request.sequences} == {SequenceStatus.PREEMPTED}
    stats = scheduler.stats()
    assert (stats.num_preemptions, stats.num_swaps, stats.blocks.host_used) == (2, 0, 0)


def test_automatic_choice_swaps_groups_and_weighs_the_others():
    scheduler = make_scheduler(mode="auto", num_blocks=20)
    scheduler.preemption.note_copies(1, 1.0)
    scheduler.preemption.note_prefill(1, 0.3)
    statuses = []
    for name, num_prompt_tokens, n in (("a", 8, 1), ("b", 5, 1), ("c", 5, 2)):
        request = add(scheduler, name, num_prompt_tokens, n=n)
        step(scheduler)
        scheduler._preempt_last()
        statuses.append(request.sequences[0].status)
        scheduler.abort_request(name)
    # Two blocks there and back are 4 s; 8 tokens are 2.4 s, 5 are 1.5 s.
    assert statuses == ["preempted", "preempted", "swapped"]
    scheduler.preemption.seconds_per_token = 0.6
    request = add(scheduler, "d", 8)
    step(scheduler)
    scheduler._preempt_last()
    assert request.sequences[0].status is SequenceStatus.SWAPPED
