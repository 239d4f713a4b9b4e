"""Forced calls: whatever is sampled within the grammar, the parser finds calls and nothing else."""

import json
import random

import numpy as np
import pytest
import tiny_tokenizers
from tiny_tokenizers import EOS

from jpaged.serving.tool_parsers import TOOL_PARSERS, forced_call, get_tool_parser
from jpaged.structured_outputs import GrammarCompiler, GrammarMatcher, mask_width
from jpaged.tokenizer import Tokenizer

pytest.importorskip("llguidance")

WEATHER = {
    "$defs": {"unit": {"enum": ["C", "F"]}},
    "properties": {"city": {"type": "string", "maxLength": 5}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "no.args-2"}},
]
MARKERS = {
    "none": [],
    "hermes": ["<tool_call>", "</tool_call>"],
    "llama3_json": ["<|python_tag|>"],
    "mistral": ["[TOOL_CALLS]"],
    "mistral_v13": ["[TOOL_CALLS]", "[ARGS]"],
}


def _tokenizer(markers, special=True):
    backend = tiny_tokenizers.byte_level()
    (backend.add_special_tokens if special else backend.add_tokens)(MARKERS[markers])
    return Tokenizer(backend, eos_token_ids=(EOS,))


def _walk(tokenizer, params, seed):
    """The text of a random walk through a grammar that favours what is no whitespace."""
    compiler = GrammarCompiler(tokenizer, 320, [EOS])
    matcher = GrammarMatcher(compiler.compile(params))
    rng = random.Random(seed)
    mask = np.zeros((1, mask_width(320)), np.int32)
    ids: list[int] = []
    while not matcher.is_complete:
        compiler.fill([matcher], mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        dense = [i for i in allowed if tokenizer.decode([i], False).strip() or i == EOS]
        token_id = EOS if EOS in allowed and rng.random() < 0.5 else rng.choice(dense or allowed)
        if token_id == EOS:
            break
        ids.append(token_id)
        matcher.advance(token_id)
        assert len(ids) < 2000
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("parser", TOOL_PARSERS)
@pytest.mark.parametrize("markers", MARKERS)
@pytest.mark.parametrize("function", [None, "get_weather", "no.args-2"])
def test_every_answer_is_calls_of_the_tools(parser, markers, function):
    tokenizer = _tokenizer(markers)
    params = forced_call(parser, TOOLS, tokenizer, function=function)
    for seed in range(4):
        found = get_tool_parser(parser).parse(_walk(tokenizer, params, seed))
        assert found.content is None
        assert found.tool_calls
        for call in found.tool_calls:
            assert call.name in ((function,) if function else ("get_weather", "no.args-2"))
            arguments = json.loads(call.arguments)
            if call.name == "get_weather":
                assert arguments.keys() == {"city", "unit"}
                assert len(arguments["city"]) <= 5
                assert arguments["unit"] in ("C", "F")
            else:
                assert arguments == {}


@pytest.mark.parametrize("special", [True, False])
def test_markers_that_are_tokens_are_written_as_such(special):
    tokenizer = _tokenizer("hermes", special)
    params = forced_call("hermes", TOOLS, tokenizer, function="no.args-2", parallel=False)
    text = _walk(tokenizer, params, 0)
    assert text == '<tool_call>\n{"name": "no.args-2", "arguments": {}}\n</tool_call>'


def test_without_parallel_calls_there_is_one():
    tokenizer = _tokenizer("none")
    for parser in TOOL_PARSERS:
        params = forced_call(parser, TOOLS, tokenizer, parallel=False)
        for seed in range(6):
            found = get_tool_parser(parser).parse(_walk(tokenizer, params, seed))
            assert len(found.tool_calls) == 1


def test_names_are_quoted():
    tool = {"type": "function", "function": {"name": 'a"\\b\x7fé'}}
    params = forced_call("hermes", [tool], parallel=False)
    found = get_tool_parser("hermes").parse(_walk(_tokenizer("none"), params, 0))
    assert found.tool_calls[0].name == 'a"\\b\x7fé'


@pytest.mark.parametrize(
    ("parser", "tools", "function", "match"),
    [
        ("hermes", [], None, "at least 1 function to call, got none"),
        ("hermes", TOOLS, "other", "tool_choice must name one of the tools, got 'other'"),
        ("hermes", [{"type": "function"}], None, "tools must hold functions with a name"),
        ("hermes", [{"function": {"name": "f", "parameters": []}}], None, "must be a JSON schema"),
        ("pythonic", TOOLS, None, "cannot force a call with tool_call_parser 'pythonic'"),
    ],
)
def test_what_cannot_be_forced_is_refused(parser, tools, function, match):
    with pytest.raises(ValueError, match=match):
        forced_call(parser, tools, function=function)


def test_unsupported_keywords_are_refused_even_if_the_schema_says_not_to():
    schema = {"x-guidance": {"lenient": True}, "properties": {"a": {"not": {}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    compiler = GrammarCompiler(_tokenizer("none"), 320, [EOS])
    with pytest.raises(ValueError, match='Unimplemented keys: \\["not"\\]'):
        compiler.compile(forced_call("hermes", [tool]))
