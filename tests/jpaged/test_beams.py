"""Beam search in the engine: transformers' results, however its steps are scheduled."""

import asyncio
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from jpaged import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from jpaged.compile_plan import StepShape

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "beam_search.json").read_text("utf-8"))
PROMPT = tiny_models.PROMPT
_rng = np.random.RandomState(8)
OTHERS = [_rng.randint(3, 96, size=n).tolist() for n in (17, 30, 3, 9)]
BEAMS = SamplingParams(
    use_beam_search=True, temperature=0, n=2, best_of=4, max_tokens=16, stop_token_ids=[22, 45]
)
DRAWN = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)


def _params(case, **fields):
    return SamplingParams(
        use_beam_search=True,
        temperature=0,
        n=case["beam_width"],
        max_tokens=case["max_tokens"],
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
        ignore_eos=True,
        stop_token_ids=case["end_token_ids"],
        **fields,
    )


def _run(llm, prompts, params):
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    _assert_idle(llm)
    return outputs


def _assert_idle(llm):
    engine = llm.engine
    assert not engine.has_unfinished
    engine.scheduler.check_invariants()
    assert engine.stats().scheduler.blocks.used == 0


def _found(output):
    return [(completion.token_ids, completion.score) for completion in output.outputs]


def _assert_equal(output, hypotheses):
    """The same tokens, and the same scores but for rounding."""
    ids, scores = zip(*_found(output), strict=True)
    assert list(ids) == [hypothesis["token_ids"] for hypothesis in hypotheses]
    assert scores == pytest.approx([h["score"] for h in hypotheses], rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def llm(tiny_options):
    with LLM(**tiny_options | {"max_num_seqs": 8}) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm):
    (output,) = _run(llm, [PROMPT], BEAMS)
    assert len({len(ids) for ids, _ in _found(output)}) == 2, "one ends early, or this is easy"
    return [dict(zip(("token_ids", "score"), found, strict=True)) for found in _found(output)]


@pytest.mark.parametrize("name", GOLDEN["tiny_models"])
def test_results_are_those_of_transformers(name, tiny_options, tmp_path):
    model = tiny_models.write_checkpoint(tmp_path / "model", tiny_models.CASES[name])
    options = {"model": str(model), "max_num_seqs": 16, "num_blocks": 400}
    cases = GOLDEN["tiny_models"][name]
    assert {case["beam_width"] for case in cases} == {2, 4, 6}
    with LLM(**tiny_options | options) as llm:
        outputs = _run(llm, [PROMPT] * len(cases), [_params(case) for case in cases])
    for output, case in zip(outputs, cases, strict=True):
        _assert_equal(output, case["hypotheses"])
        for completion in output.outputs:
            is_end = completion.token_ids[-1] in case["end_token_ids"]
            assert completion.finish_reason == ("stop" if is_end else "length")
            assert completion.stop_reason == (completion.token_ids[-1] if is_end else None)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="batch"),
        pytest.param({"max_num_seqs": 4}, id="alone"),
        pytest.param({"max_num_batched_tokens": 8}, id="chunks"),
        pytest.param({"enable_prefix_caching": False}, id="no_prefix_cache"),
        pytest.param({"async_scheduling": False}, id="synchronous"),
        pytest.param({"block_size": 32}, id="large_blocks"),
        pytest.param({"max_model_len": 72, "num_blocks": 20}, id="preempted"),
        pytest.param(
            {
                "max_model_len": 72,
                "num_blocks": 20,
                "enable_prefix_caching": False,
                "async_scheduling": False,
            },
            id="preempted_no_prefix_cache_synchronous",
        ),
    ],
)
def test_beams_do_not_depend_on_how_they_are_scheduled(tiny_options, expected, llm, options):
    drawn = [output.outputs[0].token_ids for output in _run(llm, OTHERS, DRAWN)]
    with LLM(**tiny_options | {"max_num_seqs": 8} | options) as other:
        prompts, params = [OTHERS[0], PROMPT, *OTHERS[1:], PROMPT], [DRAWN, BEAMS] + [DRAWN] * 3
        outputs = _run(other, prompts, [*params, BEAMS])
        _assert_equal(outputs[1], expected)
        _assert_equal(outputs[5], expected)
        assert [outputs[i].outputs[0].token_ids for i in (0, 2, 3, 4)] == drawn
        if "num_blocks" in options:
            assert other.stats().scheduler.num_preemptions >= 4
        assert other.stats().scheduler.blocks.copies > 0


def test_results_are_the_same_to_the_last_bit_in_any_batch(tiny_options, monkeypatch):
    # Programs of other shapes sum in another order, so there is one of either kind.
    shapes = (StepShape(64, 8, False), StepShape(8, 8, True))
    monkeypatch.setattr("jpaged.device_worker.step_shapes", lambda *_, **__: shapes)
    with LLM(**tiny_options | {"max_num_seqs": 8, "max_num_batched_tokens": 64}) as llm:
        (alone,) = _run(llm, [PROMPT], BEAMS)
        longer = dataclasses.replace(BEAMS, max_tokens=24, length_penalty=0.0)
        for prompts, params in (
            ([PROMPT, *OTHERS], [BEAMS, DRAWN, DRAWN, DRAWN, DRAWN]),
            ([OTHERS[0], PROMPT, OTHERS[1], PROMPT], [DRAWN, BEAMS, longer, BEAMS]),
        ):
            llm.engine.block_manager.prefix_cache.enabled = False
            for prompt, output in zip(prompts, _run(llm, prompts, params), strict=True):
                if prompt is PROMPT:
                    assert _found(output) == _found(alone)


def test_beams_share_their_blocks(llm):
    engine = llm.engine
    request = engine.make_request("b", {"prompt_token_ids": PROMPT}, BEAMS)
    engine.add_request(request)
    before = engine.stats().scheduler.num_prefill_tokens
    most_saved = num_steps = 0
    while engine.has_unfinished:
        engine.step()
        most_saved = max(most_saved, engine.stats().scheduler.blocks.saved)
        num_steps += 1
    # 41 tokens are five full blocks of 8, and a sixth that is shared until it is written.
    assert most_saved >= 3 * 5
    assert num_steps <= 2 * 16 + 4
    assert engine.stats().scheduler.num_prefill_tokens - before <= len(PROMPT)
    _assert_idle(llm)


@pytest.mark.parametrize("num_steps", range(0, 9))
def test_abort_frees_everything_at_once_and_tells_what_there_is(llm, num_steps):
    engine = llm.engine
    request = engine.make_request("b", {"prompt_token_ids": PROMPT}, BEAMS)
    engine.add_request(request)
    for _ in range(num_steps):
        assert engine.step() == []
    assert engine.abort_request("b")
    assert engine.stats().scheduler.blocks.used == 0
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    _assert_idle(llm)
    (output,) = outputs
    assert output.finished
    assert [completion.index for completion in output.outputs] == [0, 1]
    assert {completion.finish_reason for completion in output.outputs} <= {"abort", "stop"}
    if num_steps > 6:
        assert all(completion.token_ids for completion in output.outputs)


def test_a_request_that_cannot_fit_is_refused(tiny_options):
    with LLM(**tiny_options | {"max_model_len": 72, "num_blocks": 12}) as llm:
        for fields, message in (
            ({}, r"request may need 13 blocks \(4 sequences of up to 57 tokens that share 5\)"),
            ({"best_of": 5}, "best_of must be at most max_num_seqs=4, got 5"),
        ):
            with pytest.raises(ValueError, match=message):
                llm.validate_request(PROMPT, dataclasses.replace(BEAMS, **fields))
    options = tiny_options | {"max_num_seqs": 32}
    with LLM(**options) as llm:
        # The model has one end token beside the two of the request.
        llm.validate_request(OTHERS[2], dataclasses.replace(BEAMS, best_of=17))
        message = (
            r"best_of \(the beam width\) must be at most 17, which is max_logprobs=20 less 3 end"
            " tokens, got 18"
        )
        with pytest.raises(ValueError, match=message):
            llm.validate_request(OTHERS[2], dataclasses.replace(BEAMS, best_of=18))


def test_positions_have_their_logprobs(llm, expected):
    params = dataclasses.replace(BEAMS, logprobs=9, prompt_logprobs=1)
    (output,) = _run(llm, [PROMPT], params)
    _assert_equal(output, expected)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(PROMPT)
    for completion in output.outputs:
        assert completion.logprobs is not None
        taken = zip(completion.token_ids, completion.logprobs, strict=True)
        total = sum(logprobs[token_id].logprob for token_id, logprobs in taken)
        assert total == pytest.approx(completion.cumulative_logprob, abs=1e-5)
        assert completion.score == pytest.approx(total / len(completion.token_ids), abs=1e-5)
        assert all(len(logprobs) == 9 for logprobs in completion.logprobs)
        assert all(
            sorted(entry.rank for entry in logprobs.values()) == list(range(1, 10))
            for logprobs in completion.logprobs
        )


def test_beam_search_gives_whole_sequences(llm):
    params = BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=0.5, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in (PROMPT, OTHERS[2])]
    outputs = llm.beam_search(prompts, params)
    same = _run(llm, [PROMPT, OTHERS[2]], params.sampling_params())
    for output, prompt, other in zip(outputs, (PROMPT, OTHERS[2]), same, strict=True):
        assert [(s.tokens, s.score) for s in output.sequences] == [
            (prompt + ids, pytest.approx(score, abs=1e-5)) for ids, score in _found(other)
        ]
        best, *_ = output.sequences
        assert best.score == pytest.approx(best.cum_logprob / 6**0.5)
        assert (best.text, best.finish_reason, best.stop_reason) == (None, "length", None)


def test_the_asynchronous_engine_gives_one_output(tiny_options, expected):
    async def run(llm):
        (output,) = await read_all(llm.generate(PROMPT, BEAMS))
        assert output.finished
        _assert_equal(output, expected)
        # A reader that goes away frees the beams.
        reader = asyncio.create_task(read_all(llm.generate(PROMPT, BEAMS)))
        while not llm.engine.has_unfinished:
            await asyncio.sleep(0.001)
        reader.cancel()
        while llm.engine.has_unfinished:
            await asyncio.sleep(0.001)
        assert reader.cancelled()
        assert llm.stats().scheduler.blocks.used == 0

    async def read_all(outputs):
        return [output async for output in outputs]

    llm = AsyncLLM(**tiny_options)
    try:
        asyncio.run(asyncio.wait_for(run(llm), 60))
    finally:
        llm.shutdown()


def test_beam_tokens_are_counted(tiny_options):
    with LLM(**tiny_options) as llm:
        params = dataclasses.replace(BEAMS, stop_token_ids=(), ignore_eos=True, max_tokens=5)
        _run(llm, [PROMPT], params)
        stats = llm.stats()
    assert (stats.num_generated_tokens, stats.num_discarded_tokens) == (4 * 5, 0)
