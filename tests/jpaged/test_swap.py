"""Preemption under every policy, and the host tier of the prefix cache, in the whole engine."""

import numpy as np
import pytest

from jpaged import LLM, SamplingParams, device_worker
from jpaged.request import SequenceStatus

_rng = np.random.RandomState(5)
PROMPTS = [
    _rng.randint(3, 96, size=n).tolist()
    for n in (41, 35, 17, 30, 44, 33, 38, 26, 40, 29, 31, 37, 28)
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(
    temperature=0.9, top_p=0.95, seed=3, max_tokens=24, ignore_eos=True, presence_penalty=0.5
)
TENTH = 9  # blocks of 8, as many as the longest needs
SMALL = {"max_model_len": 72, "num_blocks": TENTH + 1}
POLICIES = [
    pytest.param({}, id="recompute"),
    pytest.param({"preemption_mode": "swap"}, id="swap"),
    pytest.param({"preemption_mode": "auto"}, id="auto"),
    pytest.param({"preemption_mode": "swap", "async_scheduling": False}, id="swap_synchronous"),
    pytest.param({"preemption_mode": "swap", "enable_prefix_caching": False}, id="swap_uncached"),
    pytest.param({"preemption_mode": "swap", "host_cache": True}, id="swap_host_cache"),
]


@pytest.fixture(scope="module")
def roomy(tiny_options):
    with LLM(**tiny_options) as llm:
        yield llm
        assert llm.stats().scheduler.num_preemptions == 0


def _run(llm, prompts, params):
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def _prompt_logprobs(llm, prompt):
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    return np.array(
        [
            found[token].logprob
            for token, found in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        ]
    )


def _assert_idle(llm):
    engine = llm.engine
    assert not engine.has_unfinished
    engine.scheduler.check_invariants()
    stats = engine.stats().scheduler
    assert (stats.blocks.used, stats.blocks.host_used, stats.num_swapped) == (0, 0, 0)


def test_the_small_pool_is_a_tenth_of_the_need():
    tokens = [len(prompt) + (GREEDY.max_tokens or 0) - 1 for prompt in PROMPTS]
    assert sum(-(-num // 8) for num in tokens) >= 10 * TENTH
    assert max(-(-num // 8) for num in tokens) == TENTH


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_a_run_without_preemption(tiny_options, roomy, policy):
    with LLM(**tiny_options | SMALL | policy) as llm:
        for params in (GREEDY, DRAWN):
            assert _run(llm, PROMPTS, params) == _run(roomy, PROMPTS, params)
        stats = llm.stats().scheduler
        assert stats.num_preemptions >= 10
        assert (stats.num_swaps > 0) is (policy != {})
        if policy.get("preemption_mode") == "swap":
            assert stats.num_swaps == stats.num_preemptions
            # What was swapped out once comes back once, unless the device still has it.
            assert stats.blocks.swapped_in <= stats.blocks.swapped_out or "host_cache" in policy
            assert stats.blocks.swapped_in > 0
        _assert_idle(llm)


@pytest.mark.parametrize("mode", ["recompute", "swap", "auto"])
def test_groups_keep_their_tokens(tiny_options, roomy, mode):
    """Of several samples each: their prompt's last block is shared, copied and swapped."""
    params = SamplingParams(n=2, temperature=1.0, seed=8, max_tokens=30, ignore_eos=True)
    prompts = [prompt[:27] for prompt in PROMPTS[:4]]
    expected = _run(roomy, prompts, params)
    with LLM(**tiny_options | SMALL | {"num_blocks": 14}, preemption_mode=mode) as llm:
        assert _run(llm, prompts, params) == expected
        stats = llm.stats().scheduler
        assert stats.num_preemptions > 0
        assert (stats.num_swaps > 0) is (mode != "recompute")
        _assert_idle(llm)


def _start(llm, prompts, params):
    engine = llm.engine
    for index, prompt in enumerate(prompts):
        request = engine.make_request(str(index), {"prompt_token_ids": prompt}, params)
        engine.add_request(request)
    return engine


def test_a_shared_block_is_copied_once(tiny_options):
    params = SamplingParams(n=4, temperature=1.0, seed=8, max_tokens=6, ignore_eos=True)
    with LLM(**tiny_options, preemption_mode="swap") as llm:
        engine = _start(llm, [PROMPTS[0]], params)  # 41 tokens: 5 blocks full, one of 1 token
        for _ in range(3):
            engine.step()
        before = engine.block_manager.stats()
        assert (before.used, before.saved) == (9, 15)
        engine.scheduler._preempt_last()
        engine.scheduler.check_invariants()
        stats = engine.block_manager.stats()
        assert (stats.used, stats.host_used) == (0, 9)
        (request,) = [engine.scheduler.get_request("0")]
        assert request is not None
        assert all(seq.status is SequenceStatus.SWAPPED for seq in request.unfinished)
        while engine.has_unfinished:
            engine.step()
        stats = engine.block_manager.stats()
        assert stats.swapped_out == 9
        # The full blocks of the prompt were still cached on the device.
        assert stats.swapped_in == 4
        _assert_idle(llm)


def test_a_group_that_is_swapped_out_at_once_goes_on_with_its_prompt(tiny_options, roomy):
    params = SamplingParams(n=2, temperature=1.0, seed=8, max_tokens=6, ignore_eos=True)
    expected = _run(roomy, PROMPTS[:1], params)
    with LLM(**tiny_options | {"max_num_batched_tokens": 16}, preemption_mode="swap") as llm:
        engine = _start(llm, PROMPTS[:1], params)
        found = []
        for number in range(40):
            found += engine.step()
            if number in (0, 1, 2, 4, 7) and engine.scheduler._running:
                engine.scheduler._preempt_last()
                engine.scheduler.check_invariants()
        assert [[c.token_ids for c in output.outputs] for output in found[-1:]] == expected
        assert llm.stats().scheduler.num_swaps >= 4
        _assert_idle(llm)


def test_aborting_what_is_swapped_out_leaves_nothing(tiny_options, roomy):
    with LLM(**tiny_options | SMALL, preemption_mode="swap") as llm:
        engine = _start(llm, PROMPTS, GREEDY)
        swapped, found = set(), {}
        while engine.has_unfinished:
            for output in engine.step():
                found[output.request_id] = output
            requests = [engine.scheduler.get_request(str(i)) for i in range(len(PROMPTS))]
            now = {
                request.request_id
                for request in requests
                if request is not None and request.unfinished[0].status is SequenceStatus.SWAPPED
            }
            if now and len(swapped) < 3:
                swapped.add(min(now))
                assert engine.abort_request(min(now))
                engine.scheduler.check_invariants()
        assert len(swapped) == 3
        for index, expected in enumerate(_run(roomy, PROMPTS, GREEDY)):
            reason = found[str(index)].outputs[0].finish_reason
            assert reason == ("abort" if str(index) in swapped else "length")
            if reason == "length":
                assert found[str(index)].outputs[0].token_ids == expected[0]
        _assert_idle(llm)


def test_tokens_do_not_depend_on_the_layout_of_the_pool(monkeypatch, tiny_options, roomy):
    expected = _run(roomy, PROMPTS, GREEDY)
    monkeypatch.setattr(device_worker, "preferred_layout", lambda head_dim: "merged")
    with LLM(**tiny_options | SMALL, preemption_mode="swap") as llm:
        spec = llm.engine.runner.worker.kv_spec
        assert spec.shape(1)[1::3] == (1, 2 * spec.head_dim)
        assert _run(llm, PROMPTS, GREEDY) == expected
        assert llm.stats().scheduler.num_swaps > 0
        _assert_idle(llm)


def test_a_pool_of_fp8_takes_less_memory_and_swaps_like_any_other(tiny_options, roomy):
    options = tiny_options | {"kv_cache_dtype": "fp8"}
    with LLM(**options) as llm:
        spec, whole = llm.engine.runner.worker.kv_spec, roomy.engine.runner.worker.kv_spec
        assert (spec.dtype, whole.dtype) == ("float8_e4m3fn", "float32")
        assert 4 * spec.block_bytes == whole.block_bytes
        expected = _run(llm, PROMPTS, GREEDY)
        errors = _prompt_logprobs(llm, PROMPTS[0]) - _prompt_logprobs(roomy, PROMPTS[0])
    # Three bits of mantissa: 0.1 nats for SmolLM2-135M's logprobs of English text too.
    assert 0 < np.abs(errors).mean() < 0.2
    with LLM(**options | SMALL, preemption_mode="swap") as llm:
        assert _run(llm, PROMPTS, GREEDY) == expected
        assert llm.stats().scheduler.num_swaps > 0
        _assert_idle(llm)


def test_a_full_host_pool_means_computing_again(tiny_options, roomy):
    expected = _run(roomy, PROMPTS, GREEDY)
    with LLM(**tiny_options | SMALL, preemption_mode="swap") as llm:
        block_bytes = (
            llm.engine.runner.worker.kv_spec.block_bytes * llm.engine.model_config.num_layers
        )
    gib = 4.5 * block_bytes / 2**30
    with LLM(**tiny_options | SMALL, preemption_mode="swap", swap_space=gib) as llm:
        assert llm.stats().scheduler.blocks.host_blocks == 4
        assert _run(llm, PROMPTS, GREEDY) == expected
        stats = llm.stats().scheduler
        assert 0 < stats.num_swaps < stats.num_preemptions
        _assert_idle(llm)
    with pytest.raises(ValueError, match=r"swap_space must be at least a block's .* GiB, got"):
        LLM(**tiny_options, preemption_mode="swap", swap_space=0.9 * block_bytes / 2**30)


def test_automatic_choice_measures_both_costs(monkeypatch, tiny_options):
    with LLM(**tiny_options | SMALL, preemption_mode="auto") as llm:
        assert (llm.stats().block_copy_s, llm.stats().prefill_token_s) == (None, None)
        _run(llm, PROMPTS, GREEDY)
        stats = llm.stats()
        assert stats.block_copy_s is not None
        assert stats.prefill_token_s is not None
        assert 0 < stats.block_copy_s < 1
        assert 0 < stats.prefill_token_s < 1
        # Computing is now dear, and then cheap.
        llm.engine.preemption.seconds_per_token = 1e6
        before = llm.stats().scheduler
        monkeypatch.setattr(llm.engine.preemption, "note_prefill", lambda *_: None)
        _run(llm, PROMPTS, GREEDY)
        middle = llm.stats().scheduler
        llm.engine.preemption.seconds_per_token = 1e-12
        _run(llm, PROMPTS, GREEDY)
        after = llm.stats().scheduler
        assert (
            middle.num_swaps - before.num_swaps == middle.num_preemptions - before.num_preemptions
        )
        assert middle.num_swaps > before.num_swaps
        assert after.num_preemptions > middle.num_preemptions
        assert after.num_swaps == middle.num_swaps
        _assert_idle(llm)


def test_evicted_prompts_come_back_from_the_host(tiny_options, roomy):
    expected = _run(roomy, PROMPTS, GREEDY)
    with LLM(**tiny_options | SMALL, host_cache=True, swap_space=1e-2) as llm:
        assert [_run(llm, [prompt], GREEDY)[0] for prompt in PROMPTS] == expected
        first = llm.stats().scheduler
        assert (first.blocks.host_hits, first.num_preemptions) == (0, 0)
        assert first.blocks.swapped_out > 40
        assert [_run(llm, [prompt], GREEDY)[0] for prompt in PROMPTS] == expected
        second = llm.stats().scheduler
        num_hit_tokens = sum((len(prompt) - 1) // 8 * 8 for prompt in PROMPTS)
        assert second.blocks.prefix_hit_tokens - first.blocks.prefix_hit_tokens == num_hit_tokens
        assert second.blocks.host_hits > 30
        assert second.num_prefill_tokens - first.num_prefill_tokens <= 8 * len(PROMPTS)
        _assert_idle(llm)


def test_an_engine_that_failed_swaps_again(tiny_options, roomy, monkeypatch):
    expected = _run(roomy, PROMPTS, GREEDY)
    with LLM(**tiny_options | SMALL, preemption_mode="swap") as llm:
        swap, calls = llm.engine.runner.swap, []

        def fail(scheduled):
            calls.append(scheduled)
            if len(calls) == 3:
                raise KeyboardInterrupt
            swap(scheduled)

        monkeypatch.setattr(llm.engine.runner, "swap", fail)
        with pytest.raises(KeyboardInterrupt):
            _run(llm, PROMPTS, GREEDY)
        assert _run(llm, PROMPTS, GREEDY) == expected
        _assert_idle(llm)


def test_swapping_needs_no_compilation_after_warmup(tiny_options):
    with LLM(**tiny_options | SMALL | {"compilation": "eager"}, preemption_mode="swap") as llm:
        names = {program.name for program in llm.compile_plan.programs}
        assert {"swap_out_2", "swap_out_16", "swap_in_2", "swap_in_16"} <= names
        _run(llm, PROMPTS, GREEDY)
        assert llm.stats().scheduler.num_swaps > 0
        assert llm.stats().num_compilations_after_warmup == 0


def test_nothing_is_there_for_swapping_unless_it_is_asked_for(roomy):
    assert roomy.engine.block_manager.host is None
    assert roomy.engine.runner.worker.swapper is None
    names = {program.name for program in roomy.compile_plan.programs}
    assert not any(name.startswith("swap") for name in names)
    assert roomy.stats().scheduler.blocks.host_blocks == 0
