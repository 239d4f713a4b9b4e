"""Structured output in the whole engine: a model with random weights that must keep to its form."""

import asyncio
import json
import re
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_tokenizers
from tiny_tokenizers import END_OF_TURN, EOS

from jpaged import (
    LLM,
    AsyncLLM,
    SamplingParams,
    StructuredOutputsParams,
    structured_outputs,
)
from jpaged.models.loader import load_model

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["x", "yy"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
JSON = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
REGEX = StructuredOutputsParams(regex=r"[A-Z][a-z]{2,5}-[0-9]{2}(é|ñ)?")
CHOICE = StructuredOutputsParams(choice=["red", "green", "reddish", "日本"])
GRAMMAR = StructuredOutputsParams(grammar='start: "(" start ")" | /[01]{1,4}/')
GBNF = StructuredOutputsParams(grammar='root ::= "yes" | "no" [a-c] root')
FORMS = {"json": JSON, "regex": REGEX, "choice": CHOICE, "grammar": GRAMMAR, "gbnf": GBNF}
PROMPTS = ["Hi there", "Name someone.", "x" * 30, "é"]


def _is_of_form(form, text):
    match form:
        case "json":
            found = json.loads(text)
            assert found.keys() <= SCHEMA["properties"].keys()
            assert len(found["name"]) <= 6
            assert type(found["age"]) is int
            assert 0 <= found["age"] <= 120
            assert len(found.get("tags", ())) <= 2
            return set(found.get("tags", ())) <= {"x", "yy"}
        case "choice":
            return text in ("red", "green", "reddish", "日本")
        case "grammar":
            return re.fullmatch(r"(\(*)[01]{1,4}(\)*)", text) and text.count("(") == text.count(")")
        case "gbnf":
            return re.fullmatch("(no[a-c])*yes", text)
        case _:
            return re.fullmatch(r"[A-Z][a-z]{2,5}-[0-9]{2}(é|ñ)?", text)


def _drawn(form, seed=0, **fields):
    if isinstance(form, str):
        form = FORMS[form]
    fields = {"temperature": 1.0, "max_tokens": 150, "seed": seed} | fields
    return SamplingParams(structured_outputs=form, **fields)


def _run(llm, params, prompts=PROMPTS):
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    assert all(output.finished for output in outputs)
    return outputs


def _told(outputs):
    return [
        (part.text, part.token_ids, part.finish_reason, part.stop_reason)
        for output in outputs
        for part in output.outputs
    ]


def _texts(llm, params):
    outputs = _run(llm, params)
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs)
    return [output.outputs[0].text for output in outputs]


def _assert_idle(llm):
    engine = llm.engine
    assert not engine.has_unfinished
    engine.scheduler.check_invariants()
    stats = engine.stats().scheduler
    assert (stats.blocks.used, stats.blocks.host_used, stats.num_swapped) == (0, 0, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("structured") / "byte_level"
    return tiny_tokenizers.write_model(directory, tiny_tokenizers.byte_level())


@pytest.fixture(scope="module")
def options(model):
    return {
        "model": model,
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_model_len": 256,
        "block_size": 8,
        "num_blocks": 257,
        "compilation": "lazy",
    }


@pytest.fixture(scope="module")
def llm(options):
    with LLM(**options) as llm:
        yield llm
        _assert_idle(llm)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fields", [{}, {"temperature": 0}, {"top_k": 5, "top_p": 0.8}])
def test_output_keeps_to_its_form(llm, form, fields):
    for seed in range(3):
        for output in _run(llm, _drawn(form, seed, **fields)):
            (part,) = output.outputs
            assert part.finish_reason in ("stop", "length")
            if part.finish_reason == "stop":
                assert _is_of_form(form, part.text), part
            else:
                assert len(part.token_ids) == 150, "only the depth of the grammar is unbounded"


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_any_kind_of_tokenizer_will_do(options, tmp_path, kind):
    backend = getattr(tiny_tokenizers, kind)()
    options = options | {"model": tiny_tokenizers.write_model(tmp_path / "model", backend)}
    with LLM(**options) as llm:
        for form in ("json", "regex", "choice"):
            for part in (output.outputs[0] for output in _run(llm, _drawn(form))):
                assert part.finish_reason == "stop"
                assert _is_of_form(form, part.text), part


def test_greedy_output_is_the_likeliest_that_is_allowed(llm, model):
    """Against whole recomputation and the library's own mask."""
    loaded = load_model(model, dtype="float32")
    engine = llm.engine
    compiler = structured_outputs.GrammarCompiler(
        engine.tokenizer, tiny_tokenizers.VOCAB_SIZE, engine.eos_token_ids
    )
    for form in ("json", "regex", "grammar"):
        (output,) = _run(llm, _drawn(form, temperature=0, max_tokens=40), PROMPTS[:1])
        matcher = structured_outputs.GrammarMatcher(compiler.compile(FORMS[form]))
        ids = list(output.prompt_token_ids)
        mask = np.zeros((1, 10), np.int32)
        for token_id in output.outputs[0].token_ids:
            compiler.fill([matcher], mask)
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
            padded = ids + [0] * (128 - len(ids))
            logits = tiny_models.paged_logits(loaded.model, loaded.params, padded)[len(ids) - 1]
            assert token_id == np.where(allowed, logits, -np.inf).argmax()
            matcher.advance(token_id)
            ids.append(token_id)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"async_scheduling": False}, id="synchronous"),
        pytest.param({"max_num_seqs": 1}, id="alone"),
        pytest.param({"max_num_batched_tokens": 8}, id="chunks"),
        pytest.param({"enable_prefix_caching": False}, id="no_prefix_cache"),
        pytest.param({"max_model_len": 192, "num_blocks": 25}, id="recompute"),
        pytest.param(
            {"max_model_len": 192, "num_blocks": 25, "preemption_mode": "swap"}, id="swap"
        ),
    ],
)
def test_tokens_do_not_depend_on_how_they_are_scheduled(llm, options, changed):
    params = [_drawn(form, seed) for form in FORMS for seed in range(2)]
    params += [SamplingParams(temperature=1.0, seed=s, max_tokens=60) for s in range(4)]
    prompts = [PROMPTS[i % 4] + str(i) * 20 for i in range(len(params))]
    expected = _told(_run(llm, params, prompts))
    with LLM(**options | changed) as other:
        assert _told(_run(other, params, prompts)) == expected
        stats = other.stats().scheduler
        if "num_blocks" in changed:
            assert stats.num_preemptions >= 3
            assert (stats.num_swaps > 0) is ("preemption_mode" in changed)
        _assert_idle(other)


def test_neighbours_without_structure_are_not_touched(llm):
    free = [SamplingParams(temperature=1.0, seed=s, max_tokens=40, logprobs=1) for s in range(4)]
    forms = [_drawn(form) for form in (JSON, REGEX, CHOICE, GRAMMAR)]
    alone = [output.outputs[0] for output in _run(llm, free)]
    mixed = [output.outputs[0] for output in _run(llm, [*free, *forms], PROMPTS * 2)]
    assert [part.token_ids for part in mixed[:4]] == [part.token_ids for part in alone]
    assert [part.logprobs for part in mixed[:4]] == [part.logprobs for part in alone]


@pytest.mark.parametrize("num_free", [0, 1])
def test_alone_or_in_the_majority_it_takes_every_step_else_every_other_one(llm, num_free):
    params = _drawn(StructuredOutputsParams(regex="(ab){10}"))
    num_tokens = len(_run(llm, params, ["Hi"])[0].outputs[0].token_ids)
    engine = llm.engine
    free = SamplingParams(temperature=1.0, max_tokens=100, ignore_eos=True)
    before = llm.stats().scheduler.num_steps
    engine.add_request(engine.make_request("structured", "Hi", params))
    for i in range(num_free):
        engine.add_request(engine.make_request(f"free-{i}", "Hi", free))
    while engine.scheduler.get_request("structured") is not None:
        engine.step()
    num_steps = llm.stats().scheduler.num_steps - before
    for i in range(num_free):
        engine.abort_request(f"free-{i}")
    while engine.has_unfinished:
        engine.step()
    assert num_steps == (2 * num_tokens if num_free else num_tokens)


def test_continuations_of_one_prompt_go_their_own_ways(llm):
    (output,) = _run(llm, _drawn("json", n=6), PROMPTS[:1])
    assert len(output.outputs) == 6
    assert all(_is_of_form("json", part.text) for part in output.outputs)
    assert len({part.text for part in output.outputs}) > 1


def test_other_parameters_work_within_the_form(llm):
    tokenizer = llm.get_tokenizer()
    (x,) = tokenizer.encode("x")
    text = StructuredOutputsParams(regex="[a-z]{4,8}")
    assert set(_texts(llm, _drawn(text, logit_bias={x: 100.0}))) == {"x" * 8}
    letters = [token for letter in "pqr" for token in tokenizer.encode(letter)]
    for found in _texts(llm, _drawn(text, allowed_token_ids=letters)):
        assert re.fullmatch("[pqr]{4,8}", found)
    # No token is two of these letters, and repetition divides their logits, which are all positive.
    single = StructuredOutputsParams(regex="[g-p]{4,8}")
    bias = {tokenizer.encode(letter)[0]: 50.0 for letter in "ghijklmnop"}
    for found in _texts(llm, _drawn(single, logit_bias=bias, repetition_penalty=1e6)):
        assert len(set(found)) == len(found), "no letter comes twice where others are left"
    for output in _run(llm, _drawn(text, logprobs=3)):
        (part,) = output.outputs
        for token_id, position in zip(part.token_ids, part.logprobs, strict=True):
            assert token_id in position
            assert len(position) >= 3


def test_bans_that_leave_nothing_of_the_form_give_way(llm):
    (x,) = llm.get_tokenizer().encode("x")
    cases: list[dict[str, Any]] = [{"allowed_token_ids": [x]}, {"bad_words": ["r", "g", "日"]}]
    for fields in cases:
        for found in _texts(llm, _drawn("choice", **fields)):
            assert _is_of_form("choice", found)


def test_stops_end_output_before_its_form_does(llm):
    (part,) = _run(llm, _drawn("json", stop=['"age']), PROMPTS[:1])[0].outputs
    assert (part.finish_reason, part.stop_reason) == ("stop", '"age')
    assert part.text.startswith('{"name":"')
    assert '"age' not in part.text
    (colon,) = llm.get_tokenizer().encode('":')
    params = _drawn("json", stop_token_ids=[colon], logit_bias={colon: 100})
    (part,) = _run(llm, params, PROMPTS[:1])[0].outputs
    assert (part.text, part.stop_reason) == ('{"name', colon)
    (part,) = _run(llm, _drawn("json", max_tokens=4), PROMPTS[:1])[0].outputs
    assert part.finish_reason == "length"


def test_output_that_is_complete_at_its_last_token_has_stopped(llm):
    form = StructuredOutputsParams(regex="[c-f]{4}")
    for output in _run(llm, _drawn(form, max_tokens=4)):
        assert output.outputs[0].finish_reason == "stop"
        assert len(output.outputs[0].token_ids) == 4


@pytest.mark.parametrize("end", [EOS, END_OF_TURN])
def test_any_end_token_ends_output_that_may_end(llm, end):
    open_ended = StructuredOutputsParams(regex="[g-p]{3,}")
    for output in _run(llm, _drawn(open_ended, logit_bias={end: 100.0})):
        (part,) = output.outputs
        assert (part.finish_reason, part.stop_reason) == ("stop", None)
        assert len(part.text) in (3, 4)
        assert part.token_ids[-1] == end


def test_a_stop_token_of_the_request_ends_output_that_may_end(llm):
    params = _drawn(
        StructuredOutputsParams(regex="[g-p]{3,}"), stop_token_ids=[4], logit_bias={4: 100.0}
    )
    for output in _run(llm, params):
        (part,) = output.outputs
        assert (part.stop_reason, part.token_ids[-1]) == (4, 4)
        assert re.fullmatch("[g-p]{3,4}", part.text)


def test_min_tokens_hold_back_the_end_but_not_beyond_the_form(llm):
    ends = {EOS: 100.0, END_OF_TURN: 100.0}
    open_ended = StructuredOutputsParams(regex="[g-p]{3,}")
    for output in _run(llm, _drawn(open_ended, min_tokens=10, logit_bias=ends)):
        assert len(output.outputs[0].token_ids) == 11
    closed = StructuredOutputsParams(regex="[a-z]{3}|[a-z]{4}")
    for output in _run(llm, _drawn(closed, min_tokens=20)):
        assert output.outputs[0].finish_reason == "stop"
        assert re.fullmatch("[a-z]{4}", output.outputs[0].text)


def test_tokens_beyond_the_tokenizer_are_never_sampled(llm):
    params = _drawn("json", logit_bias={tiny_tokenizers.VOCAB_SIZE - 1: 100.0, 300: 100.0})
    for output in _run(llm, params):
        assert max(output.outputs[0].token_ids) < 280


def test_a_stream_that_is_closed_leaves_nothing_behind(llm):
    stream = llm.stream("Hi", _drawn("json", n=3))
    for _ in range(3):
        next(stream)
    other = llm.stream("Hi there", _drawn("regex"))
    next(other)
    stream.close()
    *_, last = other
    assert _is_of_form("regex", last.outputs[0].text)
    _assert_idle(llm)


def test_cancelled_tasks_leave_the_others_as_they_are(options, llm):
    """Of the asynchronous engine: those that are not cancelled have the tokens of a lone run."""
    params = [_drawn(form, seed) for seed in range(4) for form in FORMS]
    prompts = [PROMPTS[i % 4] for i in range(len(params))]
    expected = _told(_run(llm, params, prompts))

    async def read(engine, i):
        outputs = []
        async for output in engine.generate(prompts[i], params[i]):
            if i % 3 == 0 and len(output.outputs[0].token_ids) >= i % 5:
                return None
            outputs.append(output)
        return _told(outputs[-1:])

    async def run():
        async with AsyncLLM(**options) as engine:
            found = await asyncio.gather(*(read(engine, i) for i in range(len(params))))
            async for _ in engine.generate("Hi", _drawn("choice")):
                pass  # What was cancelled before it is gone when it ends.
            stats = engine.stats().scheduler
            assert (stats.num_running, stats.num_waiting, stats.blocks.used) == (0, 0, 0)
            return found

    for i, told in enumerate(asyncio.run(run())):
        assert told is None or told == expected[i : i + 1]
        assert told is None or i % 3 or len(told[0][1]) < max(i % 5, 1)


def test_nothing_is_compiled_after_warm_up(options):
    eager = {"compilation": "eager", "strict_compilation": True, "max_num_seqs": 1}
    with LLM(**options | eager | {"max_num_batched_tokens": 16}) as llm:
        names = [program.name for program in llm.compile_plan.programs]
        assert [name for name in names if "mask" in name] == ["set_masks_1"]
        outputs = _run(llm, [_drawn(form) for form in ("json", "regex", "choice", "grammar")])
        assert all(output.outputs[0].text for output in outputs)
        assert llm.stats().num_compilations_after_warmup == 0


def test_a_grammar_whose_limit_others_used_up_is_compiled_again(llm, monkeypatch):
    form = StructuredOutputsParams(regex="((a|b)*a(a|b){9}c)")
    expected = _told(_run(llm, [_drawn(form, s, max_tokens=60) for s in range(4)]))
    limits = {"verbose_errors": False, "max_lexer_states": 70}
    monkeypatch.setattr(structured_outputs, "_LIMITS", limits)
    compiler = llm.engine._grammars
    compiler._drop(form)
    renewed = []
    renew = structured_outputs.Grammar.renew
    monkeypatch.setattr(
        structured_outputs.Grammar,
        "renew",
        lambda self, failed, ids: renewed.append(len(ids)) or renew(self, failed, ids),
    )
    assert _told(_run(llm, [_drawn(form, s, max_tokens=60) for s in range(4)])) == expected
    assert renewed


def test_a_form_that_grows_beyond_the_limits_ends_its_request_only(llm, monkeypatch):
    limits = {"verbose_errors": False, "max_lexer_states": 30}
    monkeypatch.setattr(structured_outputs, "_LIMITS", limits)
    form = StructuredOutputsParams(regex="((a|b)*a(a|b){8}c)")
    failed, fine = _run(llm, [_drawn(form, max_tokens=60), _drawn("choice")], PROMPTS[:2])
    assert failed.outputs[0].finish_reason == "abort"
    assert "too many states" in failed.outputs[0].stop_reason
    assert fine.outputs[0].finish_reason == "stop"
    _assert_idle(llm)


def test_a_model_without_tokenizer_refuses_structure(options):
    with (
        LLM(**options | {"skip_tokenizer_init": True}) as llm,
        pytest.raises(ValueError, match="structured_outputs needs a tokenizer"),
    ):
        llm.generate({"prompt_token_ids": [5, 6]}, _drawn("json"))


def test_a_missing_package_is_one_line(llm, monkeypatch):
    monkeypatch.setattr(structured_outputs, "is_available", lambda: False)
    llm.engine._grammars._cache.clear()
    monkeypatch.setattr(llm.engine._grammars, "_backend", None)
    with pytest.raises(ValueError, match=r"needs the package llguidance: pip install"):
        llm.generate("Hi", _drawn("json"))
