"""Grammars by themselves: what is allowed when, what is refused and how, cache and threads."""

import concurrent.futures
import json
import threading
from typing import Any

import numpy as np
import pytest
import tiny_tokenizers
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import END_OF_TURN, EOS, VOCAB_SIZE

from jpaged import structured_outputs
from jpaged.structured_outputs import GrammarCompiler, GrammarMatcher, mask_width
from jpaged.structured_outputs_params import StructuredOutputsParams
from jpaged.tokenizer import Tokenizer

pytest.importorskip("llguidance")

_TOKENIZERS = {
    kind: Tokenizer(getattr(tiny_tokenizers, kind)(), eos_token_ids=(EOS,))
    for kind in ("byte_level", "sentencepiece")
}
_COMPILERS = {
    kind: GrammarCompiler(tokenizer, VOCAB_SIZE, [EOS, END_OF_TURN])
    for kind, tokenizer in _TOKENIZERS.items()
}


def _nested(name):
    schema = {"$ref": f"#/$defs/{name}"}
    for _ in range(10):
        schema = {"type": "array", "items": schema}
    return schema


def _compile(kind="byte_level", **fields):
    return _COMPILERS[kind].compile(StructuredOutputsParams(**fields))


def _allowed(matcher, kind="byte_level"):
    mask = np.zeros((1, mask_width(VOCAB_SIZE)), np.int32)
    _COMPILERS[kind].fill([matcher], mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def _follow(matcher, text, kind="byte_level"):
    """Whether the grammar lets a text pass, token by token, and then end."""
    for token_id in _TOKENIZERS[kind].encode(text, add_special_tokens=False):
        if token_id not in _allowed(matcher, kind):
            return False
        matcher.advance(token_id)
        assert matcher.error is None
    return matcher.is_complete or bool({EOS, END_OF_TURN} & _allowed(matcher, kind))


@pytest.mark.parametrize("kind", _COMPILERS)
@settings(max_examples=60)
@given(choices=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4))
def test_every_choice_passes_and_no_other_text(kind, choices):
    grammar = _compile(kind, choice=choices)
    for choice in choices:
        assert _follow(GrammarMatcher(grammar), choice, kind)
        longer = choice + "!"
        assert _follow(GrammarMatcher(grammar), longer, kind) is (longer in choices)


_scalars = st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=4)
_schemas = st.recursive(
    st.sampled_from([{"type": kind} for kind in ("null", "boolean", "integer", "string")])
    | st.lists(_scalars, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    lambda inner: st.builds(lambda items: {"type": "array", "items": items}, inner)
    | st.dictionaries(st.text(max_size=3), inner, max_size=2).map(
        lambda properties: {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    ),
    max_leaves=4,
)  # fmt: skip


def _example(schema, draw):
    """A value of a schema as `_schemas` makes them."""
    if "enum" in schema:
        return draw(st.sampled_from(schema["enum"]))
    match schema["type"]:
        case "array":
            return [_example(schema["items"], draw) for _ in range(draw(st.integers(0, 2)))]
        case "object":
            return {name: _example(of, draw) for name, of in schema["properties"].items()}
        case kind:
            kinds = {"null": st.none(), "boolean": st.booleans(), "integer": st.integers(-99, 99)}
            return draw(kinds.get(kind, st.text(max_size=4)))


@settings(max_examples=100)
@given(st.data(), _schemas)
def test_what_a_schema_describes_passes_it(data, schema):
    text = json.dumps(_example(schema, data.draw), ensure_ascii=data.draw(st.just(True)))
    compact = json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)
    if "\\u" in compact or "\x7f" in compact:
        return  # Control characters may be escaped in other ways than here.
    assert _follow(GrammarMatcher(_compile(json=schema)), compact)
    assert _follow(GrammarMatcher(_compile(json=schema, disable_any_whitespace=True)), compact)
    assert not _follow(GrammarMatcher(_compile(json=schema)), compact + "]")


def test_whitespace_is_as_it_was_asked_for():
    schema = {"type": "array", "items": {"type": "integer"}}
    cases: list[tuple[dict[str, Any], bool, bool]] = [
        ({}, True, True),
        ({"disable_any_whitespace": True}, False, False),
        ({"whitespace_pattern": "[ ]?"}, True, False),
    ]
    for fields, spaced, wide in cases:
        grammar = _compile(json=schema, **fields)
        assert _follow(GrammarMatcher(grammar), "[1,2]")
        assert _follow(GrammarMatcher(grammar), "[1, 2]") is spaced
        assert _follow(GrammarMatcher(grammar), "[1,\n 2]") is wide


def test_the_schema_true_allows_any_json():
    for text in ("[1]", '{"a": null}', '"x"'):
        assert _follow(GrammarMatcher(_compile(json=True)), text)


def test_any_json_object_passes_json_object():
    grammar = _compile(json_object=True)
    assert _follow(GrammarMatcher(grammar), '{"a": [1, {"b": null}]}')
    assert not _follow(GrammarMatcher(grammar), "[1]")


@pytest.mark.parametrize("regex", ["a|bc", "^a|bc$", "(a|bc)"])
def test_a_regex_is_matched_as_a_whole(regex):
    grammar = _compile(regex=regex)
    for text, passes in (("a", True), ("bc", True), ("ab", False), ("c", False)):
        assert _follow(GrammarMatcher(grammar), text) is passes


@pytest.mark.parametrize("kind", _COMPILERS)
def test_special_tokens_and_those_the_tokenizer_lacks_are_no_text(kind):
    tokenizer = _TOKENIZERS[kind]
    allowed = _allowed(GrammarMatcher(_compile(kind, regex="(.|\n)+")), kind)
    assert allowed
    assert not any(tokenizer.is_special(token_id) for token_id in allowed)
    assert max(allowed) < tokenizer.vocab_size < VOCAB_SIZE


@pytest.mark.parametrize("text", ["<|tag|>", "</s>", "<think>", "[X]"])
@pytest.mark.parametrize("special", [True, False])
def test_text_that_spells_a_special_token_is_written_in_others(text, special):
    backend = tiny_tokenizers.byte_level()
    if backend.token_to_id(text) is None:
        (backend.add_special_tokens if special else backend.add_tokens)([text])
    tokenizer = Tokenizer(backend, eos_token_ids=(EOS,))
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, [EOS])
    mask = np.zeros((1, mask_width(VOCAB_SIZE)), np.int32)
    for choices in (["a" + text], [text + "b", text + "c"], ["{}" + text * 2]):
        matcher = GrammarMatcher(compiler.compile(StructuredOutputsParams(choice=choices)))
        ids = []
        while not matcher.is_complete:
            compiler.fill([matcher], mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            ids.append(int(allowed[0]))
            matcher.advance(ids[-1])
            assert matcher.error is None
        assert tokenizer.decode(ids, skip_special_tokens=True) in choices


def test_end_tokens_are_allowed_where_output_may_end_and_nowhere_else():
    matcher = GrammarMatcher(_compile(regex="ab?"), end_token_ids=[4, 319])
    a, b = _TOKENIZERS["byte_level"].encode("a") + _TOKENIZERS["byte_level"].encode("b")
    (ab,) = _TOKENIZERS["byte_level"].encode("ab")
    assert _allowed(matcher) == {a, ab}
    matcher.advance(a)
    assert _allowed(matcher) == {b, EOS, END_OF_TURN, 4, 319}
    assert not matcher.is_complete
    matcher.advance(b)
    assert matcher.is_complete
    assert _allowed(matcher) == {EOS, END_OF_TURN, 4, 319}


def test_matchers_of_one_grammar_go_their_own_ways():
    grammar = _compile(choice=["ax", "bx"])
    one, other = GrammarMatcher(grammar), GrammarMatcher(grammar)
    one.advance(_TOKENIZERS["byte_level"].encode("a")[0])
    assert _allowed(one) == set(_TOKENIZERS["byte_level"].encode("x"))
    assert len(_allowed(other)) == 2


def test_masks_of_many_matchers_are_those_of_each():
    grammars = [_compile(regex=f"[a-{end}]x") for end in "bcdefgh"]
    matchers = [GrammarMatcher(grammar, [4]) for grammar in grammars]
    masks = np.full((9, mask_width(VOCAB_SIZE)), 7, np.int32)
    _COMPILERS["byte_level"].fill(matchers, masks[:7])
    assert (masks[7:] == 7).all()
    for matcher, mask in zip(matchers, masks, strict=False):
        found = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        assert set(found.tolist()) == _allowed(matcher)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"json": {"not": {}}}, r'structured_outputs.json cannot be used: Unimplemented.*"not"'),
        ({"json": {"type": "array", "uniqueItems": True}}, '"uniqueItems"'),
        ({"json": {"x-guidance": {"lenient": True}, "if": {}}}, 'Unimplemented keys: \\["if"\\]'),
        ({"json": {"type": "text"}}, "Invalid type: text"),
        ({"json": {"type": "string", "format": "colour"}}, "Unknown format: colour"),
        ({"json": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
        ({"json": {"$ref": "#/$defs/x"}}, "does not exist"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "Default retriever does not fetch"),
        ({"json": False}, "Unsatisfiable schema"),
        ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "Unsatisfiable schema"),
        ({"json": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}, "oneOf"),
        ({"regex": "(a"}, "structured_outputs.regex cannot be used: .*unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"grammar": "start: nothing"}, 'unknown name: "nothing"'),
        ({"grammar": "root ::= ("}, "structured_outputs.grammar cannot be used"),
        ({"json": {}, "whitespace_pattern": "("}, "structured_outputs.json cannot be used"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(fields, match):
    with pytest.raises(ValueError, match=match) as error:
        _compile(**fields)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("limit", "match"),
    [
        ({"initial_lexer_fuel": 100}, "initial lexer configuration .* too big .limit .*: 100"),
        ({"max_grammar_size": 10}, "grammar size .number of symbols. too big .limit .*: 10"),
    ],
)
def test_a_grammar_beyond_a_limit_is_refused_by_the_limits_name(limit, match, monkeypatch):
    monkeypatch.setattr(structured_outputs, "_LIMITS", limit)
    properties = {f"p{i}": {"type": "string", "pattern": "a" * i} for i in range(50)}
    with pytest.raises(ValueError, match=match):
        _compile(json={"type": "object", "properties": properties})


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": "start: r0\n" + "".join(f"r{i}:r{i + 1}\n" for i in range(4500)) + 'r4500:"b"'},
        {
            "json": {
                "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)},
                "$ref": "#/$defs/d0",
            }
        },
        {"json": {"$defs": {f"d{i}": _nested(f"d{i + 1}") for i in range(700)}, **_nested("d0")}},
    ],
)
def test_deep_recursion_does_not_end_the_process(fields):
    """It did: stacks of the usual size overflow at a depth of 3,000."""
    fields = dict(fields)
    if "$defs" in fields.get("json", {}):
        fields["json"]["$defs"][f"d{len(fields['json']['$defs'])}"] = {"type": "null"}
    matcher = GrammarMatcher(_compile(**fields))
    for _ in range(20):
        matcher.advance(min(_allowed(matcher)))
        if matcher.is_complete:
            break
    assert matcher.error is None


def test_an_expansive_regex_is_bounded():
    _compile(regex="(a{1,1000}){1,1000}")
    with pytest.raises(ValueError, match=r"structured_outputs.regex cannot be used"):
        _compile(regex="(" * 4000 + "a" + ")" * 4000)


def test_nobody_waits_for_a_compilation_without_end(monkeypatch):
    monkeypatch.setattr(structured_outputs, "MAX_COMPILATION_S", 0.05)
    monkeypatch.setattr(structured_outputs, "_slots", threading.BoundedSemaphore(1))
    end = threading.Event()
    run = structured_outputs._run_apart
    with pytest.raises(ValueError, match=r"takes more than 0.05 s"):
        run(end.wait, 1.0)
    with pytest.raises(ValueError, match="too many others are being compiled"):
        run(lambda: 1, 0.0)
    grammar = object.__new__(structured_outputs.Grammar)
    end.set()
    assert run(lambda: grammar, 60.0) is grammar, "its slot is free again"


def _kind(number):
    return {
        "type": "object",
        "properties": {"kind": {"const": f"k{number}"}, "size": {"type": "integer"}},
        "required": ["kind", "size"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"choice": [f"{i * 7919 % 10_007} of many" for i in range(10_000)]},
        {"json": {"enum": [f"{i * 7919 % 10_007} of many" for i in range(10_000)]}},
        {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(200)}}},
        {"json": {"anyOf": [_kind(i) for i in range(600)]}},
    ],
)
def test_large_specifications_are_within_the_limits(fields):
    rng = np.random.default_rng(0)
    matcher = GrammarMatcher(_compile(**fields))
    for _ in range(40):
        token_id = int(rng.choice(sorted(_allowed(matcher))))
        if matcher.is_complete or token_id in (EOS, END_OF_TURN):
            break
        matcher.advance(token_id)
        assert matcher.error is None


def test_a_text_of_ever_more_meanings_ends_at_the_limit(monkeypatch):
    assert structured_outputs._LIMITS["max_items_in_row"] == 1000
    monkeypatch.setitem(structured_outputs._LIMITS, "max_items_in_row", 99)
    matcher = GrammarMatcher(_compile(grammar='start: s\ns: s s | "a"'))
    (a,) = _TOKENIZERS["byte_level"].encode("a")
    for _ in range(100):
        if matcher.error is not None:
            break
        _allowed(matcher)
        matcher.advance(a)
    assert matcher.error is not None
    assert "max is 99" in matcher.error
    assert not matcher.is_complete


def test_empty_lines_and_comments_of_a_grammar_cost_nothing():
    """They did: 65,000 empty lines a minute, in Python."""
    lines = "\n" * 20_000
    for text in (f'{lines}start: "a"{lines}  | "b"{lines}', f'root ::= {lines}"a" | "b"'):
        grammar = _compile(grammar=text)
        assert _follow(GrammarMatcher(grammar), "a")
        assert not _follow(GrammarMatcher(grammar), "c")
    comments = "#\n" * 30_000
    assert _follow(GrammarMatcher(_compile(grammar=f'{comments}root ::= "#" # end\n')), "#")


def test_preparing_makes_the_tokenizer_once():
    compiler = GrammarCompiler(_TOKENIZERS["byte_level"], VOCAB_SIZE, [EOS])
    compiler.prepare()
    prepared = compiler._backend
    compiler.compile(StructuredOutputsParams(regex="a"))
    assert prepared is compiler._backend is not None


def test_a_grammar_is_compiled_once_and_a_bad_one_is_not_kept(monkeypatch):
    compiler = GrammarCompiler(_TOKENIZERS["byte_level"], VOCAB_SIZE, [EOS])
    grammar = compiler.compile(StructuredOutputsParams(json={"type": "null"}))
    assert compiler.compile(StructuredOutputsParams(json='{"type":"null"}')) is grammar
    for _ in range(2):
        with pytest.raises(ValueError, match="unclosed group"):
            compiler.compile(StructuredOutputsParams(regex="("))
    assert compiler.num_cached == 1


@pytest.mark.parametrize("limit", ["MAX_CACHED_GRAMMARS", "MAX_CACHED_CHARS"])
def test_the_cache_is_bounded_and_keeps_what_was_used_last(limit, monkeypatch):
    monkeypatch.setattr(structured_outputs, limit, 3)
    compiler = GrammarCompiler(_TOKENIZERS["byte_level"], VOCAB_SIZE, [EOS])
    kept = compiler.compile(StructuredOutputsParams(regex="k"))
    for letter in "abcdef":
        compiler.compile(StructuredOutputsParams(regex=letter))
        assert compiler.compile(StructuredOutputsParams(regex="k")) is kept
        assert compiler.num_cached <= 3
    compiler.compile(StructuredOutputsParams(regex="too long to be kept beside others"))
    assert compiler.num_cached == (1 if limit == "MAX_CACHED_CHARS" else 3)


def test_threads_that_want_the_same_grammar_compile_it_once(monkeypatch):
    compiler = GrammarCompiler(_TOKENIZERS["byte_level"], VOCAB_SIZE, [EOS])
    made = []
    grammar = structured_outputs.Grammar
    monkeypatch.setattr(
        structured_outputs, "Grammar", lambda *args: made.append(args[1]) or grammar(*args)
    )
    forms = [StructuredOutputsParams(regex=f"[a-z]{{{1 + i % 4}}}") for i in range(64)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(compiler.compile, forms))
    assert len(made) == 4
    assert all(found[i] is found[i % 4] for i in range(64))


def test_a_failed_assertion_of_the_package_is_an_ordinary_error(monkeypatch):
    panic = type("PanicException", (BaseException,), {})

    def fail(*_):
        raise panic("internal error")

    monkeypatch.setattr(structured_outputs, "Grammar", fail)
    compiler = GrammarCompiler(_TOKENIZERS["byte_level"], VOCAB_SIZE, [EOS])
    with pytest.raises(ValueError, match="llguidance failed on it"):
        compiler.compile(StructuredOutputsParams(regex="a"))


def test_a_tokenizer_without_bytes_is_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    compiler = GrammarCompiler(Tokenizer(backend), VOCAB_SIZE, [])
    with pytest.raises(ValueError, match="cannot be used with this model's tokenizer: can't") as e:
        compiler.compile(StructuredOutputsParams(regex="a"))
    assert "\n" not in str(e.value)


def test_a_tokenizer_larger_than_the_model_is_refused():
    compiler = GrammarCompiler(_TOKENIZERS["byte_level"], 100, [EOS])
    with pytest.raises(ValueError, match=r"at most as many tokens as the model \(100\), got 276"):
        compiler.compile(StructuredOutputsParams(regex="a"))


def test_a_model_without_end_tokens_still_gets_its_form():
    compiler = GrammarCompiler(Tokenizer(tiny_tokenizers.byte_level()), VOCAB_SIZE, [])
    matcher = GrammarMatcher(compiler.compile(StructuredOutputsParams(regex="ab")))
    matcher.advance(_TOKENIZERS["byte_level"].encode("ab")[0])
    assert matcher.is_complete
