import functools
import math
import re

import jax
import numpy as np
import pytest
import tiny_models

from jpaged import LLM, SamplingParams, device_worker
from jpaged.compile_plan import StepProgram, StepShape
from jpaged.models.loader import load_model

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
_rng = np.random.RandomState(3)
PROMPTS = [_rng.randint(3, 96, size=n).tolist() for n in (41, 5, 17, 1, 24, 33)]


@pytest.fixture(scope="module")
def llm(tiny_options):
    with LLM(**tiny_options) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(tiny_model):
    """Greedy continuations by recomputing everything for every token."""
    loaded = load_model(tiny_model, dtype="float32")
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(GREEDY.max_tokens or 0):
            padded = ids + [0] * (64 - len(ids))  # one shape; causal, so padding changes nothing
            logits = tiny_models.paged_logits(loaded.model, loaded.params, padded)
            ids.append(int(logits[len(ids) - 1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def _ids(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def _run(llm, prompts, params):
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def _assert_idle(llm):
    """Nothing is left behind: no block used, no row taken, all invariants hold."""
    engine = llm.engine
    assert not engine.has_unfinished
    engine.scheduler.check_invariants()
    engine.block_manager.check_invariants()
    assert engine.stats().scheduler.blocks.used == 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="batch"),
        pytest.param({"max_num_seqs": 1}, id="alone"),
        pytest.param({"max_num_batched_tokens": 4}, id="chunks"),
        pytest.param({"max_model_len": 72, "num_blocks": 10}, id="preempted"),
        pytest.param({"enable_prefix_caching": False}, id="no_prefix_cache"),
        pytest.param({"async_scheduling": False}, id="synchronous"),
        pytest.param({"block_size": 32}, id="large_blocks"),
        pytest.param({"compilation": "background"}, id="background_compilation"),
    ],
)
def test_tokens_do_not_depend_on_how_they_are_scheduled(tiny_options, expected, options):
    with LLM(**{**tiny_options, **options}) as llm:
        assert _ids(_run(llm, PROMPTS, GREEDY)) == expected
        if "num_blocks" in options:
            assert llm.stats().scheduler.num_preemptions >= 2
        assert _ids(_run(llm, PROMPTS, GREEDY)) == expected, "with a filled prefix cache"
        _assert_idle(llm)


@pytest.mark.parametrize("options", [{"max_num_seqs": 1}, {"max_model_len": 72, "num_blocks": 10}])
def test_seeded_draws_do_not_depend_on_neighbours_or_preemption(llm, tiny_options, options):
    params = SamplingParams(
        temperature=0.9, top_p=0.95, seed=11, max_tokens=20, ignore_eos=True, presence_penalty=0.5
    )
    together = _ids(_run(llm, PROMPTS, params))
    with LLM(**{**tiny_options, **options}) as other:
        assert _ids(_run(other, PROMPTS, params)) == together


def test_unseeded_requests_repeat_with_the_engine_seed(tiny_options):
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)

    def draw(seed):
        with LLM(**tiny_options, seed=seed) as llm:
            return _ids(_run(llm, PROMPTS[:2], params))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_parallel_samples_differ_and_repeat(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=8, ignore_eos=True)
    (output,) = _run(llm, [PROMPTS[0]], params)
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3
    again = _run(llm, [PROMPTS[0]], params)[0]
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in output.outputs]
    _assert_idle(llm)


def test_prefix_cache_hits_are_told(tiny_options):
    with LLM(**tiny_options) as llm:
        first, second = (_run(llm, [PROMPTS[0]], GREEDY)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 40, "five full blocks of 8 of the 41 tokens"


def test_cache_salt_separates(tiny_options):
    with LLM(**tiny_options) as llm:
        hits = [
            llm.generate(
                {"prompt_token_ids": PROMPTS[0], "cache_salt": salt}, GREEDY, use_tqdm=False
            )[0].num_cached_tokens
            for salt in ("a", "b", "a")
        ]
    assert hits == [0, 0, 40]


def test_logprobs_are_those_of_the_model(llm, tiny_model, expected):
    params = SamplingParams(
        temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    loaded = load_model(tiny_model, dtype="float32")
    outputs = _run(llm, PROMPTS, params)
    for prompt, output, ids in zip(PROMPTS, outputs, expected, strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == ids[:6]
        text = prompt + ids[:6]
        logits = tiny_models.paged_logits(loaded.model, loaded.params, text)
        reference = np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))
        assert output.prompt_logprobs is not None
        assert completion.logprobs is not None
        assert output.prompt_logprobs[0] is None
        told = [*output.prompt_logprobs[1:], *completion.logprobs]
        for position, entry in enumerate(told):
            assert entry is not None
            count = 2 if position + 1 < len(prompt) else 3
            row = reference[position]
            assert {*np.argsort(-row)[:count].tolist(), text[position + 1]} == set(entry)
            for token, logprob in entry.items():
                assert logprob.logprob == pytest.approx(row[token], abs=1e-4)
                assert logprob.rank == 1 + int((row > row[token]).sum())
        assert completion.cumulative_logprob == pytest.approx(
            sum(reference[len(prompt) - 1 + i, token] for i, token in enumerate(ids[:6])), abs=1e-3
        )


def test_max_logprobs_may_exceed_the_vocabulary(tiny_options):
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=96)
    with LLM(**tiny_options, max_logprobs=200) as llm:
        logprobs = _run(llm, PROMPTS[:1], params)[0].outputs[0].logprobs
        assert logprobs is not None
        assert [len(entry) for entry in logprobs] == [96]
        with pytest.raises(ValueError, match="logprobs must be at most max_logprobs=96, got 97"):
            llm.generate(PROMPTS[0], SamplingParams(logprobs=97))


def test_prompt_logprobs_are_whole_although_the_prompt_is_cached(tiny_options):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(**tiny_options) as llm:
        _run(llm, [PROMPTS[0]], GREEDY)
        (output,) = _run(llm, [PROMPTS[0]], params)
    assert output.prompt_logprobs is not None
    assert all(entry is not None for entry in output.prompt_logprobs[1:])


def test_stop_token_ends_and_is_reported(llm, expected):
    token = expected[0][5]
    first = expected[0].index(token)
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[token], ignore_eos=True)
    completion = _run(llm, [PROMPTS[0]], params)[0].outputs[0]
    assert completion.token_ids == expected[0][: first + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", token)
    _assert_idle(llm)


def test_min_tokens_bans_the_stop_token_until_then(llm, expected):
    token = expected[0][0]
    params = SamplingParams(
        temperature=0, max_tokens=20, min_tokens=7, stop_token_ids=[token], ignore_eos=True
    )
    ids = _run(llm, [PROMPTS[0]], params)[0].outputs[0].token_ids
    assert token not in ids[:7]


def test_allowed_and_biased_tokens(llm):
    params = SamplingParams(temperature=0, max_tokens=9, allowed_token_ids=[7, 9], ignore_eos=True)
    assert set(_run(llm, [PROMPTS[1]], params)[0].outputs[0].token_ids) <= {7, 9}
    params = SamplingParams(temperature=0, max_tokens=9, logit_bias={11: 100.0}, ignore_eos=True)
    assert set(_run(llm, [PROMPTS[1]], params)[0].outputs[0].token_ids) == {11}


def test_rows_are_cleared_between_requests(llm, expected):
    biased = SamplingParams(temperature=0, max_tokens=4, logit_bias={11: 100.0}, ignore_eos=True)
    _run(llm, PROMPTS[:4], biased)
    assert _ids(_run(llm, PROMPTS, GREEDY)) == expected


def test_length_ends_at_max_model_len(tiny_options):
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    with LLM(**{**tiny_options, "max_model_len": 48}) as llm:
        completion = _run(llm, [PROMPTS[0]], params)[0].outputs[0]
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == 48 - 41


def test_abort_frees_blocks_at_once_and_spares_the_others(llm, expected):
    engine = llm.engine
    requests = [
        engine.make_request(f"r{i}", {"prompt_token_ids": p}, GREEDY)
        for i, p in enumerate(PROMPTS[:3])
    ]
    for request in requests:
        engine.add_request(request)
    outputs = [output for _ in range(4) for output in engine.step()]
    used = engine.stats().scheduler.blocks.used
    assert engine.abort_request("r1")
    assert engine.stats().scheduler.blocks.used < used
    assert not engine.abort_request("r1"), "it is gone"
    while engine.has_unfinished:
        outputs += engine.step()
    last = {output.request_id: output.outputs[0] for output in outputs}
    assert last["r1"].finish_reason == "abort"
    assert last["r0"].token_ids == expected[0]
    assert last["r2"].token_ids == expected[2]
    _assert_idle(llm)


@pytest.fixture
def accelerator_shapes(monkeypatch):
    shapes = functools.partial(device_worker.step_shapes, on_accelerator=True)
    monkeypatch.setattr(device_worker, "step_shapes", lambda *args, **_: shapes(*args))


def _kinds_that_ran(llm):
    """Whether plain programs, or others, or both have been compiled."""
    programs = llm.engine.runner.plan.programs
    return {p.shape.plain for p in programs if isinstance(p, StepProgram) and p.compiled}


@pytest.mark.usefixtures("accelerator_shapes")
def test_plain_programs_run_only_what_is_plain(tiny_options, expected):
    with LLM(**tiny_options) as llm:
        assert _ids(_run(llm, PROMPTS, GREEDY)) == expected
        assert _kinds_that_ran(llm) == {True}
        drawn = SamplingParams(temperature=0.9, seed=11, max_tokens=20, ignore_eos=True)
        asking = SamplingParams(temperature=0, logprobs=1, max_tokens=20, ignore_eos=True)
        penal = SamplingParams(temperature=0, presence_penalty=1.5, max_tokens=9, ignore_eos=True)
        params = [GREEDY, drawn, asking, GREEDY, penal, GREEDY]
        outputs = _run(llm, PROMPTS, params)
        assert _kinds_that_ran(llm) == {True, False}
        for i in (0, 2, 3, 5):
            assert outputs[i].outputs[0].token_ids == expected[i]
        assert outputs[0].outputs[0].logprobs is None
        assert len(outputs[2].outputs[0].logprobs or ()) == 20
        _assert_idle(llm)
    with LLM(**{**tiny_options, "max_num_seqs": 1}) as llm:
        alone = _run(llm, PROMPTS, params)
    assert _ids(alone) == _ids(outputs)


@pytest.mark.usefixtures("accelerator_shapes")
def test_prompt_logprobs_keep_a_step_from_the_plain_programs(tiny_options, expected):
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1, ignore_eos=True)
    with LLM(**tiny_options) as llm:
        (output,) = _run(llm, [PROMPTS[0]], params)
    assert len(output.prompt_logprobs or ()) == len(PROMPTS[0])
    assert output.outputs[0].token_ids == expected[0][:3]


def test_the_pool_is_updated_in_place(llm):
    runner, num_blocks, num_layers = llm.engine.runner, 5000, 3
    dims = runner.worker.kv_spec.shape(num_blocks)
    pool_bytes = num_blocks * runner.worker.kv_spec.block_bytes
    for shape in (
        StepShape(4, 4, True),
        StepShape(4, 4, True, plain=True),
        StepShape(32, 4, False),
    ):
        compiled = runner.worker.step.lower(shape, num_blocks).compile()
        analysis = compiled.memory_analysis()
        assert analysis.alias_size_in_bytes >= pool_bytes * num_layers, "the whole pool is aliased"
        assert analysis.temp_size_in_bytes < pool_bytes / 4, "there is no room for a copy of it"
        pool_type = f"f32[{','.join(map(str, dims))}]"
        text = compiled.as_text()
        assert pool_type in text, "the text names the pool as this test expects"
        copies = re.findall(rf"= {re.escape(pool_type)}[^ ]* copy\(.*", text)
        assert not copies, "nothing as large as a layer's pool is copied"
        # Block copies are made under one condition for all layers, if the program has them at all.
        conditions = re.findall(rf"= \((?:{re.escape(pool_type)}[^ ]*,? ?)+\) conditional\(", text)
        assert len(conditions) == (0 if shape.plain else 1)
        assert all(found.count(pool_type) == num_layers for found in conditions)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ({"prompt_token_ids": []}, {}, "prompt must have at least 1 token, got 0"),
        ({"prompt_token_ids": [3] * 128}, {}, "prompt must be at most 127 tokens"),
        ({"prompt_token_ids": [96]}, {}, r"prompt_token_ids must be in \[0, 95\], got 96"),
        ({"prompt_token_ids": [-1]}, {}, r"prompt_token_ids must be in \[0, 95\], got -1"),
        ({"prompt_token_ids": ["a"]}, {}, "prompt_token_ids must be integers, got 'a'"),
        ({"prompt_token_ids": 3}, {}, "prompt_token_ids must be a list of integers, got int"),
        ({"tokens": [3]}, {}, "prompt must have only the keys"),
        ({}, {}, "prompt must be text or have prompt or prompt_token_ids"),
        ({"prompt_token_ids": [3], "cache_salt": ""}, {}, "cache_salt must be a non-empty string"),
        ("text", {}, "prompt must be token ids: this model has no tokenizer"),
        ([3], {"stop": "x"}, "stop needs a tokenizer"),
        ([3], {"bad_words": ["x"]}, "bad_words needs a tokenizer"),
        ([3], {"logprobs": 21}, "logprobs"),
        ([3], {"stop_token_ids": [96]}, "stop_token_ids"),
        ([3], {"n": 5, "temperature": 1.0}, "n must be"),
    ],
)
def test_bad_requests_are_refused_before_any_work(llm, prompt, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([{"prompt_token_ids": [3, 4]}, prompt], SamplingParams(**params))
    _assert_idle(llm)


def test_a_request_that_can_never_fit_is_refused_at_once(tiny_options):
    with LLM(**{**tiny_options, "max_model_len": 72, "num_blocks": 10}) as llm:
        params = SamplingParams(n=2, temperature=1.0, max_tokens=40)
        with pytest.raises(
            ValueError, match=r"may need 14 blocks \(2 sequences of up to 72 tokens that share 4\)"
        ):
            llm.validate_request(PROMPTS[5], params)


def test_a_pool_too_small_for_one_sequence_is_refused(tiny_options):
    with pytest.raises(ValueError, match="max_model_len of 128 tokens needs 17 blocks"):
        LLM(**{**tiny_options, "num_blocks": 16})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 129}, "max_model_len must be at most the model's 128, got 129"),
        ({"gpu_memory_utilization": 0.5}, "did you mean memory_utilization"),
        ({"block_size": 12}, "block_size must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"policy": "lifo"}, "policy must be one of"),
        ({"memory_utilization": 1.5}, r"memory_utilization must be in \(0, 1\]"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1"),
        ({"max_num_batched_tokens": 2}, "max_num_batched_tokens must be at least max_num_seqs"),
        ({"kv_cache_memory_bytes": 1000}, "exclude each other"),
        ({"strict_compilation": True}, "strict_compilation needs compilation"),
        ({"load_format": "pickle"}, "load_format must be one of"),
        ({"compilation": "never"}, "compilation must be one of"),
    ],
)
def test_bad_options_are_refused(tiny_options, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(**{**tiny_options, **options})


def test_counters_add_up(tiny_options):
    with LLM(**tiny_options) as llm:
        _run(llm, PROMPTS, GREEDY)
        stats = llm.stats()
    assert stats.num_prompt_tokens == sum(map(len, PROMPTS))
    assert stats.num_generated_tokens == 20 * len(PROMPTS)
    assert stats.num_compilations_after_warmup > 0, "lazy compilation is counted"
    assert math.isfinite(stats.host_time_s)
    assert stats.host_time_s > 0


def test_after_shutdown_requests_are_refused(tiny_options):
    llm = LLM(**tiny_options)
    llm.shutdown()
    with pytest.raises(RuntimeError, match="the engine was shut down"):
        llm.generate([3, 4], GREEDY)


def test_checking_a_request_does_not_shift_unseeded_draws(tiny_options):
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    with LLM(**tiny_options) as llm:
        plain = _ids(_run(llm, PROMPTS[:1], params))
    with LLM(**tiny_options) as llm:
        llm.validate_request(PROMPTS[1], params)
        assert _ids(_run(llm, PROMPTS[:1], params)) == plain
