"""Tool calls in model output: every format whole, in pieces, malformed and cut off."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.serving.tool_parsers import (
    TOOL_PARSERS,
    ParsedMessage,
    ToolCall,
    ToolDelta,
    collect,
    get_tool_parser,
    needs_special_tokens,
)

# What the texts of the property test are made of: markers, halves of them, JSON and its pieces.
_FRAGMENTS = (
    "<tool_call>", "</tool_call>", "<tool", "_call>", "<|python_tag|>", "<|python", "[TOOL_CALLS]",
    "[ARGS]", "[CALL_ID]", "[TOOL", "[", "]", "{", "}", '"', ":", ",", ";", "\\", " ", "\n", "name",
    '"name"', '"arguments"', '"parameters"', "null", "true", "-1.5e3", "0", "\\u00e9", "text", "é",
    '{"name": "f", "arguments": {"a": [1, {"b": "}"}]}}', '{"name": "g", "parameters": {}}',
    '{"arguments": {"x": "y"}, "name": "h"}', '{"name": "f"', ', "arguments": ', "{}", "f",
)  # fmt: skip
_texts = st.lists(st.sampled_from(_FRAGMENTS), max_size=24).map("".join)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
_calls = st.lists(
    st.tuples(
        st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True),
        st.dictionaries(st.text(), _json, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


def _in_format(parser: str, calls: list[tuple[str, dict]], ascii_only: bool) -> str:
    """The calls as a model of that format writes them."""

    def dumps(value: object) -> str:
        return json.dumps(value, ensure_ascii=ascii_only)

    match parser:
        case "hermes":
            objects = [dumps({"name": name, "arguments": args}) for name, args in calls]
            return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)
        case "llama3_json":
            return "; ".join(dumps({"name": name, "parameters": args}) for name, args in calls)
        case "mistral":
            return "[TOOL_CALLS] " + dumps([{"name": n, "arguments": a} for n, a in calls])
        case _:
            return "".join(f"[TOOL_CALLS]{name}[ARGS]{dumps(args)}" for name, args in calls)


def _streamed(parser: str, pieces: list[str]) -> list[ToolDelta]:
    stream = get_tool_parser(parser).stream()
    return [*(delta for piece in pieces for delta in stream.push(piece)), *stream.finish()]


def _cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@settings(max_examples=400)
@given(st.sampled_from(TOOL_PARSERS), _texts, st.lists(st.integers(0, 1 << 20), max_size=12))
def test_pieces_of_any_text_give_what_the_whole_gives(parser, text, places):
    whole = get_tool_parser(parser).parse(text)
    assert collect(_streamed(parser, _cut(text, places))) == whole
    assert collect(_streamed(parser, list(text))) == whole
    for delta in _streamed(parser, list(text)):
        assert delta.content != ""
        assert delta.arguments != ""


@given(
    st.sampled_from([*TOOL_PARSERS, "mistral_v13"]),
    _calls,
    st.booleans(),
    st.sampled_from(["", "So:\n"]),
)
def test_well_formed_calls_are_found_whatever_their_arguments(style, calls, ascii_only, before):
    parser = "mistral" if style == "mistral_v13" else style
    before = "" if parser == "llama3_json" else before
    text = before + _in_format(style, calls, ascii_only)
    found = get_tool_parser(parser).parse(text)
    assert found.content == (before.rstrip() or None)
    assert [(call.name, json.loads(call.arguments)) for call in found.tool_calls] == calls


@settings(max_examples=200)
@given(st.sampled_from(TOOL_PARSERS), _calls, st.integers(0, 1 << 20))
def test_a_call_that_is_cut_off_never_shows_as_text_once_it_was_told(parser, calls, place):
    text = _in_format(parser, calls, True)
    text = text[: place % (len(text) + 1)]
    deltas = _streamed(parser, list(text))
    names = [delta.name for delta in deltas if delta.name is not None]
    assert names == [name for name, _ in calls][: len(names)]
    for index, call in enumerate(collect(deltas).tool_calls[:-1]):
        assert json.loads(call.arguments) == calls[index][1]


@given(st.sampled_from(TOOL_PARSERS), st.text(alphabet=st.characters(exclude_characters="<[{")))
def test_text_without_calls_is_told_as_it_is(parser, text):
    assert get_tool_parser(parser).parse(text) == ParsedMessage(text or None, [])


def test_arguments_come_while_they_are_written():
    stream = get_tool_parser("hermes").stream()
    assert stream.push('Look. <tool_call>\n{"name": "f", ') == [ToolDelta(content="Look.")]
    assert stream.push('"arguments": {"city": "Pa') == [
        ToolDelta(index=0, name="f"),
        ToolDelta(index=0, arguments='{"city": "Pa'),
    ]
    assert stream.push('ris"}') == [ToolDelta(index=0, arguments='ris"}')]
    assert stream.push("}\n</tool_call>\n") == []
    assert stream.finish() == []


def test_arguments_before_the_name_wait_for_it():
    stream = get_tool_parser("hermes").stream()
    assert stream.push('<tool_call>{"arguments": {"a": 1}, "na') == []
    assert stream.push('me": "f"}') == [
        ToolDelta(index=0, name="f"),
        ToolDelta(index=0, arguments='{"a": 1}'),
    ]


def test_text_between_and_behind_calls_is_kept():
    one = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    found = get_tool_parser("hermes").parse(f"A \n{one}\nB{one}\n")
    assert found == ParsedMessage("A\nB", [ToolCall("f", "{}")] * 2)


def test_hermes_takes_a_call_without_arguments_and_one_without_end_tag():
    found = get_tool_parser("hermes").parse(
        '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g", "arguments": {"x": 1}}'
    )
    assert found.tool_calls == [ToolCall("f", "{}"), ToolCall("g", '{"x": 1}')]


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", "<tool_call>not json</tool_call>"),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {}, "arguments": {}, "name": "f"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "no object"}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"a": 1}'),
        ("llama3_json", '{"name": "Bob", "age": 5}'),
        ("llama3_json", '{"answer": 42}'),
        ("llama3_json", 'Try {"name": "f", "parameters": {}}'),
        ("llama3_json", '<|python_tag|>print("x")'),
        ("mistral", "[TOOL_CALLS] none"),
        ("mistral", '[TOOL_CALLS] [{"name": "f"}]'),
        ("mistral", "[TOOL_CALLS]f[ARGS]no"),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]" + 100 * "x" + "[ARGS]{}"),
    ],
)
def test_a_malformed_call_stays_text(parser, text):
    assert get_tool_parser(parser).parse(text) == ParsedMessage(text, [])


def test_a_call_may_follow_a_malformed_one():
    found = get_tool_parser("hermes").parse(
        '<tool_call> <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    )
    assert found == ParsedMessage("<tool_call>", [ToolCall("f", "{}")])


def test_arguments_end_where_their_json_breaks():
    found = get_tool_parser("hermes").parse('<tool_call>{"name": "f", "arguments": {"a": oops}}')
    assert found == ParsedMessage("}}", [ToolCall("f", '{"a": oops')])


def test_llama_calls_may_stand_behind_the_tag_and_use_either_key():
    found = get_tool_parser("llama3_json").parse(
        'Well.<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}; '
        '<|python_tag|>{"name": "g", "arguments": {}}'
    )
    assert found == ParsedMessage("Well.", [ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")])


def test_mistral_call_ids_are_passed_over():
    found = get_tool_parser("mistral").parse(
        'Hm.[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{"x": 1}[TOOL_CALLS]g{"y": []}'
    )
    assert found == ParsedMessage("Hm.", [ToolCall("f", '{"x": 1}'), ToolCall("g", '{"y": []}')])


def test_an_unknown_parser_is_refused_by_name():
    for function in (get_tool_parser, needs_special_tokens):
        with pytest.raises(
            ValueError, match=r"one of hermes, llama3_json, mistral, got 'pythonic'"
        ):
            function("pythonic")


def test_importing_the_parsers_imports_no_jax():
    code = "import sys, jpaged.serving.tool_parsers; print({'jax', 'numpy'} & sys.modules.keys())"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.strip() == "set()"


def test_markers_that_are_special_tokens_are_told():
    assert [needs_special_tokens(name) for name in TOOL_PARSERS] == [False, True, True]
