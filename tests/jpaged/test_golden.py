"""The default model in float32 says what transformers says, however its requests are scheduled."""

import json
import re
from pathlib import Path
from typing import Any

import helpers
import pytest

from jpaged import LLM, BeamSearchParams, RequestOutputKind, SamplingParams
from jpaged.compile_plan import StepShape

pytestmark = [pytest.mark.model, helpers.needs_default_model]

FILES = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FILES / "smollm2_greedy.json").read_text("utf-8"))["prompts"]
BEAM_GOLDEN = json.loads((FILES / "beam_search.json").read_text("utf-8"))["default_model"]
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "num_blocks": 200,
    "compilation": "lazy",
}
CHAT = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def _two_shapes(max_num_batched_tokens, max_num_seqs, **_):
    """The largest shape of either kind, since each compiles for seconds."""
    return (
        StepShape(max_num_batched_tokens, max_num_seqs, False),
        StepShape(max_num_seqs, max_num_seqs, True),
    )


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jpaged.device_worker.step_shapes", _two_shapes)
        yield


@pytest.fixture(scope="module")
def llm():
    with LLM(**OPTIONS) as llm:
        yield llm


def _assert_golden(llm, rows, max_tokens=64):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate([row["prompt_token_ids"] for row in rows], params, use_tqdm=False)
    for row, output in zip(rows, outputs, strict=True):
        expected = row["output_token_ids"][:max_tokens]
        assert output.outputs[0].token_ids == expected, f"question {row['question_id']}"
        assert llm.get_tokenizer().encode(row["prompt"]) == row["prompt_token_ids"]


def test_all_prompts_in_one_engine(llm):
    assert len(GOLDEN) == 20
    _assert_golden(llm, GOLDEN)


@pytest.mark.parametrize(
    ("options", "num_prompts", "max_tokens", "num_preemptions"),
    [
        pytest.param({"max_num_batched_tokens": 16}, 6, 24, 0, id="chunks_of_16_tokens"),
        pytest.param({"num_blocks": 34}, 12, 48, 3, id="preempted"),
        pytest.param({"enable_prefix_caching": False}, 6, 24, 0, id="no_prefix_cache"),
        pytest.param({"max_num_seqs": 1}, 1, 64, 0, id="alone"),
    ],
)
def test_tokens_do_not_depend_on_how_they_are_scheduled(
    options, num_prompts, max_tokens, num_preemptions
):
    with LLM(**OPTIONS | options) as llm:
        _assert_golden(llm, GOLDEN[:num_prompts], max_tokens)
        assert llm.stats().scheduler.num_preemptions >= num_preemptions
        assert llm.stats().scheduler.blocks.used == 0


def _chat(llm, **params: Any):
    params = {"max_tokens": 24} | params
    (output,) = llm.chat(CHAT, SamplingParams(temperature=0, **params), use_tqdm=False)
    return output.outputs[0]


def test_chat_answers_in_text(llm):
    answer = _chat(llm)
    assert "Paris" in answer.text
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None), "it ends its turn"
    assert "<|im_end|>" not in answer.text
    assert answer.text == llm.get_tokenizer().decode(answer.token_ids)
    prompt = llm.chat_prompt(CHAT)
    assert prompt["prompt"].endswith("<|im_start|>assistant\n")
    (same,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    assert same.outputs[0].text == answer.text
    assert same.prompt == prompt["prompt"]


def test_streamed_text_adds_up_to_the_whole(llm):
    params = SamplingParams(temperature=0, max_tokens=24, output_kind=RequestOutputKind.DELTA)
    deltas = [output.outputs[0].text for output in llm.stream(llm.chat_prompt(CHAT), params)]
    assert len(deltas) > 3
    assert "".join(deltas) == _chat(llm).text


def test_a_stop_string_ends_the_text(llm):
    text = _chat(llm).text
    stop = text[12:17]  # wherever tokens begin and end
    answer = _chat(llm, stop=stop)
    assert answer.text == text[: text.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    kept = _chat(llm, stop=[stop], include_stop_str_in_output=True)
    assert kept.text == answer.text + stop


def test_bad_words_are_never_said(llm):
    words = ["Paris", "capital", "France is"]
    assert any(word in _chat(llm).text for word in words)
    answer = _chat(llm, bad_words=words, max_tokens=40)
    assert answer.text
    for word in words:
        assert word not in answer.text
        assert _chat(llm, bad_words=[word]).text.count(word) == 0


def test_logit_bias_changes_the_text(llm):
    tokenizer, text = llm.get_tokenizer(), _chat(llm).text
    first = tokenizer.encode(text, add_special_tokens=False)[0]
    avoided = _chat(llm, logit_bias={first: -100})
    assert first not in avoided.token_ids
    assert avoided.text != text
    (word,) = tokenizer.encode(" yes", add_special_tokens=False)
    assert _chat(llm, logit_bias={word: 100}, max_tokens=3, ignore_eos=True).text == " yes" * 3


def test_beam_search_finds_what_transformers_finds(llm):
    rows = [(row["prompt_token_ids"], case) for row in BEAM_GOLDEN for case in row["cases"]]
    assert len(rows) >= 10
    params = [
        SamplingParams(
            use_beam_search=True,
            temperature=0,
            n=case["beam_width"],
            max_tokens=case["max_tokens"],
            length_penalty=case["length_penalty"],
            early_stopping=case["early_stopping"],
        )
        for _, case in rows
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in rows]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for (_, case), output in zip(rows, outputs, strict=True):
        found, expected = output.outputs, case["hypotheses"]
        assert [c.token_ids for c in found] == [h["token_ids"] for h in expected], case
        assert [c.score for c in found] == pytest.approx([h["score"] for h in expected], abs=1e-3)
    ends = {completion.finish_reason for output in outputs for completion in output.outputs}
    assert ends == {"stop", "length"}
    assert llm.stats().scheduler.blocks.used == 0


def test_beam_search_answers_in_text(llm):
    tokenizer, prompt = llm.get_tokenizer(), llm.chat_prompt(CHAT)
    params = BeamSearchParams(beam_width=3, max_tokens=24)
    (output,) = llm.beam_search(prompt, params)
    best = output.sequences[0]
    assert best.finish_reason == "stop"
    assert best.tokens[: len(prompt["prompt_token_ids"])] == prompt["prompt_token_ids"]
    assert "Paris" in (best.text or "")
    assert best.text == tokenizer.decode(best.tokens[:-1], skip_special_tokens=False)
    assert [s.score for s in output.sequences] == sorted(
        (s.score for s in output.sequences), reverse=True
    )
    (same,) = llm.generate(prompt, params.sampling_params(), use_tqdm=False)
    assert best.text == prompt["prompt"] + same.outputs[0].text
    kept = BeamSearchParams(beam_width=3, max_tokens=24, include_stop_str_in_output=True)
    assert (llm.beam_search(prompt, kept)[0].sequences[0].text or "").endswith("<|im_end|>")


def test_a_step_sorts_no_vocabulary_for_its_likeliest_tokens(llm):
    runner = llm.engine.runner
    shape = StepShape(OPTIONS["max_num_seqs"], OPTIONS["max_num_seqs"], True)
    text = runner.worker.step.lower(shape, runner.num_blocks).as_text()
    chosen_from = re.findall(r"top_k.*tensor<\d+x(\d+)xf32>\s*->", text)
    chosen_from += re.findall(r"stablehlo\.sort.*?->\s*\(?tensor<\d+x(\d+)x", text, re.DOTALL)
    assert len(chosen_from) >= 3, "of the tiles' maxima, of their places, of the best tiles"
    vocab_size = llm.engine.model_config.vocab_size
    assert max(map(int, chosen_from)) < vocab_size / 10
