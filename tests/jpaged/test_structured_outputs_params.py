"""`StructuredOutputsParams`: one form, normalised, everything else refused by name."""

import pytest

from jpaged import SamplingParams, StructuredOutputsParams
from jpaged.structured_outputs_params import MAX_CHARS


def test_schemas_are_equal_and_hashable_however_they_are_given():
    schema = {"type": "object", "properties": {"é": {"type": "null"}}}
    by_mapping = StructuredOutputsParams(json=schema)
    by_text = StructuredOutputsParams(
        json='{"type":  "object", "properties": {"\\u00e9": {"type": "null"}}}'
    )
    assert by_mapping == by_text
    assert hash(by_mapping) == hash(by_text)
    assert isinstance(by_mapping.json, str)


def test_booleans_are_schemas():
    assert StructuredOutputsParams(json=True).json == "true"
    assert StructuredOutputsParams(json=False).json == "false"


def test_choices_are_kept_as_a_tuple_without_repeats():
    assert StructuredOutputsParams(choice=["a", "b", "a"]).choice == ("a", "b")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"json": {}, "regex": "a"}, "exactly one of .*, got json and regex"),
        ({"json": False, "json_object": True}, "got json and json_object"),
        ({"json": "[1]"}, "an object or a boolean, got \\[1\\]"),
        ({"json": "{"}, "json must be a JSON schema: Expecting"),
        ({"json": {"a": float("nan")}}, "json must be a JSON schema: Out of range"),
        ({"json": {"a": {1, 2}}}, "json must be a JSON schema: Object of type set"),
        ({"json": "[" * 100_000}, "nested too deeply"),
        ({"json": '{"a": "\\ud800"}'}, "json must be Unicode text"),
        ({"regex": ""}, "regex must not be empty"),
        ({"regex": 5}, "regex must be text, got 5"),
        ({"grammar": "\ud800"}, "grammar must be Unicode text"),
        ({"choice": "a"}, "choice must be a list of strings, got 'a'"),
        ({"choice": []}, "at least 1 string, got 0"),
        ({"choice": ["a", ""]}, "choice must not be empty"),
        ({"choice": [["a"]]}, "choice must be text"),
        ({"json_object": "yes"}, "json_object must be True or False, got 'yes'"),
        ({"regex": "a", "disable_any_whitespace": True}, "needs json or json_object, got regex"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "needs json or json_object, got choice"),
        (
            {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True},
            "whitespace_pattern must be None with disable_any_whitespace=True",
        ),
        ({"regex": "a" * 8193}, "regex must have at most 8192 characters, got 8193"),
        ({"json": {"not": [{"pattern": "a" * 8193}]}}, "json must have patterns of at most 8192"),
        ({"json": {"patternProperties": {"a" * 8193: {}}}}, "patterns of at most 8192 characters"),
        ({"grammar": "a" * 65537}, "grammar must have at most 65536 characters, got 65537"),
        ({"json": {"title": "a" * MAX_CHARS["json"]}}, "json must have at most 262144 characters"),
        ({"json": " " * 2**21}, "json must be a JSON schema: it has 2097152 characters"),
        ({"json": {"multipleOf": 99999937}}, "multipleOf of at most 10000 .*, got 99999937"),
        ({"json": {"items": {"multipleOf": 1.23457}}}, "multipleOf of at most 10000"),
        (
            {"json": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}},
            "of a product of at most",
        ),
        ({"json": {"allOf": [{"pattern": "a"}] * 17}}, "at most 16 patterns and formats .*got 17"),
        (
            {"json": {"$defs": {f"d{i}": {"$ref": "#/x", "pattern": "a"} for i in range(17)}}},
            "at most 16 patterns and formats",
        ),
        ({"grammar": 'start: A\nA: "a" ' + '& "a" ' * 17}, "grammar must have at most 16 '&'"),
        ({"choice": ["a" * MAX_CHARS["choice"], "b"]}, "choice must have at most"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        StructuredOutputsParams(**fields)


@pytest.mark.parametrize(
    "schema",
    [
        {"multipleOf": 0.01},
        {"multipleOf": 5000000},
        {"properties": {f"p{i}": {"pattern": "a", "$ref": "#/$defs/x"} for i in range(16)}},
        {"properties": {f"p{i}": {"pattern": "a"} for i in range(100)}},
        {"properties": {"pattern": {"type": "string"}, "multipleOf": True, "allOf": {}}},
    ],
)
def test_what_costs_little_is_taken(schema):
    assert StructuredOutputsParams(json=schema).json


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(ValueError, match=r"fields among json, regex, .*, got 'structural_tag'"):
        StructuredOutputsParams.from_dict({"structural_tag": "x"})


def test_sampling_params_take_a_mapping():
    params = SamplingParams(structured_outputs={"choice": ["a"]})
    assert params.structured_outputs == StructuredOutputsParams(choice=("a",))
    assert hash(params) == hash(SamplingParams(structured_outputs={"choice": ["a"]}))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"use_beam_search": True, "temperature": 0}, "does not work with use_beam_search=True"),
        ({"ignore_eos": True}, "structured_outputs does not work with ignore_eos=True"),
    ],
)
def test_conflicting_sampling_params_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        SamplingParams(structured_outputs={"regex": "a"}, **fields)


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"must be StructuredOutputsParams, a mapping or None"):
        SamplingParams(structured_outputs="json")  # pyright: ignore[reportArgumentType]
