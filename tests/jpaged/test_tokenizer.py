"""The tokenizer: the default model's and directories', and decoding as tokens arrive."""

import functools
import json
import sys
import types
from pathlib import Path

import gguf
import pytest
import tokenizers
from helpers import needs_default_model, shared_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.tokenizer import IncrementalDetokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2_greedy.json"
SMILE = "naïve café 你好 👩‍👩‍👧‍👦 \u0915\u094d\u0937 e\u0301"
# The model's vocabulary lacks some bytes: control characters, and those that begin planes 4 to 11.
TEXT = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0x3FFFF, exclude_categories=["Cs"])
    | st.sampled_from("\n\t\r"),
    max_size=60,
)
pytestmark = [needs_default_model, pytest.mark.model]


@functools.cache
def default():
    return load_tokenizer(None)


def stream(ids, **options):
    detokenizer = IncrementalDetokenizer(default(), **options)
    pieces = [detokenizer.append([token_id]) for token_id in ids]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    return pieces


def test_known_texts_have_known_ids():
    # Digits go singly; a leading space belongs to the word that follows.
    assert default().encode("hi 123") == [6004, 216, 33, 34, 35]
    prompts = json.loads(GOLDEN.read_text("utf-8"))["prompts"]
    for entry in prompts:
        ids = default().encode(entry["prompt"], add_special_tokens=False)
        assert ids == entry["prompt_token_ids"]
        assert default().decode(ids, skip_special_tokens=False) == entry["prompt"]


def test_counts_equal_the_published_ones_of_mt_bench():
    shared = shared_dir()
    if shared is None:
        pytest.skip("no shared workloads here")
    lines = (shared / "workloads/prompts/mt_bench.jsonl").read_text("utf-8").splitlines()
    for row in map(json.loads, lines):
        assert [len(default().encode(turn)) for turn in row["turns"]] == row["turn_tokens"]


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_every_text_survives_the_round_trip(text):
    ids = default().encode(text, add_special_tokens=False)
    assert all(0 <= token_id < default().vocab_size for token_id in ids)
    assert default().decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_one_id_and_skipped_on_request():
    tokenizer = default()
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.decode(ids) == "user\nhi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>"
    assert tokenizer.is_special(2)
    assert not tokenizer.is_special(6004)
    assert tokenizer.id_to_token(2) == "<|im_end|>"
    assert tokenizer.token_to_id("<|im_end|>") == 2
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (49152, (2,))


def test_chat_template_of_the_default_model():
    text = default().apply_chat_template([{"role": "user", "content": "hi"}])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    given_system = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    assert default().apply_chat_template(given_system, add_generation_prompt=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )
    open_ended = default().apply_chat_template(
        [*given_system, {"role": "assistant", "content": "Sure, I"}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert open_ended.endswith("<|im_start|>assistant\nSure, I")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40) | TEXT, st.booleans())
def test_streamed_text_equals_the_whole(text, skip):
    ids = default().encode(text + SMILE, add_special_tokens=False)
    pieces = stream(ids, skip_special_tokens=skip)
    assert "".join(pieces) == default().decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 300) | st.integers(0, 49151), max_size=40), st.booleans())
def test_streamed_ids_equal_the_whole_even_when_they_are_no_utf8(ids, skip):
    pieces = stream(ids, skip_special_tokens=skip)
    assert "".join(pieces) == default().decode(ids, skip_special_tokens=skip)


def test_half_a_character_is_never_shown():
    ids = default().encode("👩 好", add_special_tokens=False)
    assert len(ids) > 4  # several tokens a character
    pieces = stream(ids)
    assert pieces[0] == ""
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_unfinished_character_is_flushed_at_the_end():
    ids = default().encode("ok 👩", add_special_tokens=False)[:-1]
    detokenizer = IncrementalDetokenizer(default())
    assert detokenizer.append(ids) == "ok"  # the space shares a token with the first byte
    assert set(detokenizer.finish()) == {" ", "\N{REPLACEMENT CHARACTER}"}
    assert detokenizer.finish() == ""


def test_special_tokens_in_a_stream():
    ids = default().encode("a<|im_end|><|im_end|>b")
    assert "".join(stream(ids)) == "ab"
    for spaces in (True, False):
        options = {"skip_special_tokens": False, "spaces_between_special_tokens": spaces}
        assert "".join(stream(ids, **options)) == "a<|im_end|><|im_end|>b"


def test_prompt_ids_are_context_and_not_output():
    prompt = default().encode("The sea is")
    detokenizer = IncrementalDetokenizer(default(), prompt_token_ids=prompt)
    assert detokenizer.append(default().encode(" blue")) == " blue"
    assert detokenizer.text == " blue"


def test_directory_with_a_tokenizer_file(tmp_path):
    default().backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    config = {
        "bos_token": {"content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "chat_template": [{"name": "default", "template": "{{ bos_token }}A"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hi 123") == default().encode("hi 123")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2, 0))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "<|im_start|>A"
    (tmp_path / "chat_template.jinja").write_text("B{{ eos_token }}")
    assert load_tokenizer(tmp_path).apply_chat_template(messages) == "B<|im_end|>"


def test_template_for_tools_is_taken_where_tools_are_given(tmp_path):
    default().backend.save(str(tmp_path / "tokenizer.json"))
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "{{ tools }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    messages = [{"role": "user", "content": "hi"}]
    assert load_tokenizer(tmp_path).apply_chat_template(messages) == "A"
    assert load_tokenizer(tmp_path).apply_chat_template(messages, tools=[{"x": 1}]) == "[{'x': 1}]"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    assert load_tokenizer(tmp_path).apply_chat_template(messages, tools=[{"x": 1}]) == "T"


def test_truncation_and_padding_of_a_tokenizer_file_are_not_applied(tmp_path):
    backend = tokenizers.Tokenizer.from_str(default().backend.to_str())
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six seven"
    assert load_tokenizer(tmp_path).encode(text) == default().encode(text)
    assert load_tokenizer(tmp_path).encode("one") == default().encode("one")


def test_special_tokens_may_stand_in_a_file_of_their_own(tmp_path):
    default().backend.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))


def test_directory_without_a_tokenizer_file_asks_transformers(tmp_path, monkeypatch):
    class AutoTokenizer:
        @staticmethod
        def from_pretrained(name):
            assert name == str(tmp_path)
            return types.SimpleNamespace(backend_tokenizer=default().backend)

    with pytest.raises(ValueError, match=r"must hold a tokenizer.json \(or, older, .*\), got none"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    fake = types.SimpleNamespace(AutoTokenizer=AutoTokenizer)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hi") == default().encode("hi")
    with pytest.raises(ValueError, match="chat_template must be given: the model has none"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: 1 / 0)
    with pytest.raises(ValueError, match=r"must hold a tokenizer.json: division by zero"):
        load_tokenizer(tmp_path)


def test_broken_tokenizer_files_are_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a readable tokenizer"):
        load_tokenizer(tmp_path)
    default().backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not readable JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, r"tokenizer.ggml.model must be gpt2 or llama, got None"),
        ({"model": "gpt2", "pre": "smollm"}, r"metadata 'tokenizer.ggml.tokens' is missing"),
        ({"model": "gpt2", "pre": "smollm", "tokens": ["a"], "merges": ["b c"]}, r"x.gguf: .+"),
    ],
)
def test_unfit_gguf_tokenizers_are_named(fields, text, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in fields.items():
        kind = gguf.GGUFValueType.ARRAY if isinstance(value, list) else gguf.GGUFValueType.STRING
        writer.add_key_value(f"tokenizer.ggml.{key}", value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=text) as raised:
        load_tokenizer(tmp_path / "x.gguf")
    assert str(tmp_path) in str(raised.value)
