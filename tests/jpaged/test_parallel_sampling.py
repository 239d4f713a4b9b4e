"""Samples of one prompt, in the engine: as if they were requests of their own, but cheaper."""

import dataclasses
import functools

import numpy as np
import pytest

from jpaged import LLM, SamplingParams, device_worker
from jpaged.compile_plan import StepProgram

_rng = np.random.RandomState(5)
PROMPTS = [_rng.randint(3, 96, size=n).tolist() for n in (41, 5, 24)]
N = 3
DRAWN = SamplingParams(n=N, temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
PENALISED = SamplingParams(
    n=N,
    temperature=0.8,
    top_p=0.9,
    seed=6,
    max_tokens=20,
    ignore_eos=True,
    presence_penalty=0.7,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    logit_bias={11: 2.0},
    min_tokens=4,
    stop_token_ids=[7],
)
TOLD = SamplingParams(
    n=N, temperature=1.0, seed=7, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True
)
ALL = (DRAWN, PENALISED, TOLD)


def _run(llm, params):
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in PROMPTS], [params] * len(PROMPTS), use_tqdm=False
    )
    engine = llm.engine
    engine.scheduler.check_invariants()
    assert engine.stats().scheduler.blocks.used == 0
    return [output.outputs for output in outputs]


def _ids(outputs):
    return [[completion.token_ids for completion in samples] for samples in outputs]


def _flat(samples_of_prompts):
    return [sample for samples in samples_of_prompts for sample in samples]


def _one_by_one(llm, prompt, params):
    """The same samples as requests of their own, one after the other: no batch, nothing shared."""
    engine, completions = llm.engine, []
    alone = dataclasses.replace(params, n=1)
    for index in range(params.n):
        request = engine.make_request(f"sample {index}", {"prompt_token_ids": prompt}, alone)
        sampling = request.engine_state.sampling
        # A draw depends on the index of the sequence, which is 0 for all of these.
        sampling.row = functools.partial(lambda row, index, _: row(index), sampling.row, index)
        engine.add_request(request)
        outputs = []
        while engine.has_unfinished:
            outputs += engine.step()
        completions.append(outputs[-1].outputs[0])
    return completions


@pytest.fixture(scope="module")
def expected(tiny_options):
    with LLM(**{**tiny_options, "max_num_seqs": 1, "enable_prefix_caching": False}) as llm:
        return {params: [_one_by_one(llm, prompt, params) for prompt in PROMPTS] for params in ALL}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="batch"),
        pytest.param({"enable_prefix_caching": False}, id="no_prefix_cache"),
        pytest.param({"max_num_batched_tokens": 5}, id="chunks"),
        pytest.param({"max_num_batched_tokens": 10, "max_num_seqs": 10}, id="one_token_last_chunk"),
        pytest.param({"async_scheduling": False}, id="synchronous"),
        pytest.param({"block_size": 32}, id="large_blocks"),
        pytest.param({"max_model_len": 72, "num_blocks": 17, "max_num_seqs": 9}, id="preempted"),
        pytest.param(
            {
                "max_model_len": 72,
                "num_blocks": 17,
                "max_num_seqs": 9,
                "enable_prefix_caching": False,
                "async_scheduling": False,
            },
            id="preempted_no_prefix_cache_synchronous",
        ),
    ],
)
def test_samples_equal_requests_of_their_own(tiny_options, expected, options):
    with LLM(**{**tiny_options, **options}) as llm:
        for params in ALL:
            outputs = _run(llm, params)
            assert _ids(outputs) == _ids(expected[params])
            if params is TOLD:
                for sample, alone in zip(_flat(outputs), _flat(expected[params]), strict=True):
                    assert sample.cumulative_logprob == pytest.approx(
                        alone.cumulative_logprob, abs=1e-4
                    )
                    assert sample.logprobs is not None
                    assert alone.logprobs is not None
                    for ours, theirs in zip(sample.logprobs, alone.logprobs, strict=True):
                        assert set(ours) == set(theirs)
        stats = llm.stats().scheduler
        if "num_blocks" in options:
            assert stats.num_preemptions >= 2 * N
        if options.get("block_size", 8) == 8:
            assert stats.blocks.copies >= (N - 1) * len(ALL), "of the prompts of 41 and 5 tokens"
    drawn = _flat(_ids(expected[DRAWN]))
    assert len(set(map(tuple, drawn))) == len(drawn), "samples differ, or this compares nothing"


@pytest.fixture(scope="module")
def llm(tiny_options):
    with LLM(**tiny_options) as llm:
        yield llm


def _start(llm, prompt, params, num_steps):
    """A request after some steps, and its outputs so far."""
    request = llm.engine.make_request("r", {"prompt_token_ids": prompt}, params)
    llm.engine.add_request(request)
    return request, [output for _ in range(num_steps) for output in llm.engine.step()]


def _finish(llm, outputs):
    engine = llm.engine
    while engine.has_unfinished:
        outputs += engine.step()
    engine.scheduler.check_invariants()
    assert engine.stats().scheduler.blocks.used == 0
    return outputs[-1].outputs


@pytest.mark.parametrize("caching", [True, False])
def test_the_prompt_is_computed_and_held_once(tiny_options, caching):
    with LLM(**tiny_options, enable_prefix_caching=caching) as llm:
        # Two chunks of the prompt's 41 tokens.
        _, outputs = _start(llm, PROMPTS[0], dataclasses.replace(DRAWN, n=4), num_steps=2)
        stats = llm.engine.stats().scheduler
        assert (stats.num_prefill_tokens, stats.blocks.used) == (41, 6)
        assert (stats.blocks.shared, stats.blocks.saved, stats.blocks.copies) == (6, 18, 0)
        outputs += llm.engine.step()
        blocks = llm.engine.stats().scheduler.blocks
        assert (blocks.used, blocks.copies) == (9, 3), "the last writer keeps the origin"
        assert len(_finish(llm, outputs)) == 4
        assert llm.engine.stats().scheduler.num_prefill_tokens == 41


@pytest.mark.parametrize("num_steps", range(1, 6))
def test_abort_of_one_sample_spares_the_others(llm, expected, num_steps):
    for index in range(N):
        request, outputs = _start(llm, PROMPTS[0], DRAWN, num_steps)
        assert llm.engine.scheduler.finish_sequence(request.sequences[index], "abort")
        llm.engine.scheduler.check_invariants()
        samples = _finish(llm, outputs)
        for i in range(N):
            ids = expected[DRAWN][0][i].token_ids
            if i == index:
                assert samples[i].finish_reason == "abort"
                assert samples[i].token_ids == ids[: len(samples[i].token_ids)]
            else:
                assert samples[i].token_ids == ids


@pytest.mark.parametrize("num_steps", range(1, 6))
def test_abort_of_all_samples_frees_everything_at_once(llm, num_steps):
    _, outputs = _start(llm, PROMPTS[0], DRAWN, num_steps)
    assert llm.engine.abort_request("r")
    assert llm.engine.stats().scheduler.blocks.used == 0
    samples = _finish(llm, outputs)
    assert [sample.finish_reason for sample in samples] == ["abort"] * N


def test_prompt_logprobs_are_those_of_a_single_sample(llm):
    several, one = (
        llm.generate(PROMPTS[0], dataclasses.replace(TOLD, n=n), use_tqdm=False)[0] for n in (N, 1)
    )
    assert several.prompt_logprobs == one.prompt_logprobs
    assert len(several.prompt_logprobs) == len(PROMPTS[0])


def test_steps_with_copies_keep_from_the_programs_that_make_none(
    tiny_options, expected, monkeypatch
):
    shapes = functools.partial(device_worker.step_shapes, on_accelerator=True)
    monkeypatch.setattr(device_worker, "step_shapes", lambda *args, **_: shapes(*args))
    with LLM(**tiny_options) as llm:
        assert _ids(_run(llm, DRAWN)) == _ids(expected[DRAWN])
        programs = llm.engine.runner.plan.programs
        ran = {p.name for p in programs if isinstance(p, StepProgram) and p.compiled}
    assert ran == {"decode_4", "decode_4_plain", "mixed_32x4_plain"}


def test_copies_of_a_step_read_before_they_write(llm):
    """Of blocks that no sequence holds, so that the step itself changes none of them."""
    engine, runner = llm.engine, llm.engine.runner
    request = engine.make_request("r", {"prompt_token_ids": PROMPTS[0]}, DRAWN)
    engine.add_request(request)
    scheduled = engine.scheduler.schedule()
    free = sorted(set(range(1, runner.num_blocks)).difference(request.sequences[0].block_ids))
    copies = [(free[0], free[1]), (free[1], free[0]), (free[0], free[2])]
    for seq in scheduled.admitted:
        runner.admit(seq, request.engine_state.sampling, False)
    runner.worker.pools = tuple(
        pool + _rng.standard_normal(pool.shape).astype(np.float32) for pool in runner.worker.pools
    )
    before = [np.array(pool) for pool in runner.worker.pools]
    runner.dispatch(dataclasses.replace(scheduled, block_copies=copies)).result()
    engine.abort_request("r")
    while engine.has_unfinished:
        engine.step()
    assert len(before) > 1
    for old, new in zip(before, runner.worker.pools, strict=True):
        want = old.copy()
        for src, dst in copies:
            want[dst] = old[src]
        np.testing.assert_array_equal(np.asarray(new)[free], want[free])
