import json

import pytest
import sse

from jpaged.serving.forced_calls import CallListStream, NamedCallStream
from jpaged.serving.tool_parsers import collect

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


def tool(name, **parameters):
    schema = {"type": "object", "properties": parameters}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("add", x={"type": "integer"}), tool("ask", text={"type": "string"})]
NAMED = {"type": "function", "function": {"name": "ask"}}
CALLS = '[{"name":"add","arguments":{"x":[1,2]}},{"name":"ask","arguments":{"text":"a]}\\"{"}}]'


@pytest.fixture
def auto(make_client):
    return make_client(enable_auto_tool_choice=True, tool_call_parser="hermes")


def post(client, **fields):
    return client.post(PATH, json={"messages": USER, "tools": TOOLS} | fields)


def message(client, **fields):
    answer = post(client, **fields)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["message"], choice["finish_reason"]


def streamed(client, **fields):
    """What a stream adds up to: text, calls by index, finish reason."""
    answer = post(client, stream=True, **fields)
    assert answer.status_code == 200, answer.text
    text, calls, reason = "", {}, None
    for event in sse.parse(answer.content):
        (choice,) = event["choices"]
        reason = choice["finish_reason"] or reason
        text += choice["delta"].get("content") or ""
        for delta in choice["delta"].get("tool_calls", ()):
            call = calls.setdefault(delta["index"], {"arguments": ""})
            if "id" in delta:
                assert delta["type"] == "function"
                assert "id" not in call, "it comes once"
                call |= {"id": delta["id"], "name": delta["function"]["name"]}
            call["arguments"] += delta["function"].get("arguments", "")
    return text, [calls[i] for i in sorted(calls)], reason


def pairs(calls):
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def test_auto_needs_a_parser(client, make_client):
    error = post(client).json()["error"]
    assert error["param"] == "tool_choice"
    assert "--tool-call-parser" in error["message"]
    with pytest.raises(ValueError, match="tool_call_parser must be one of"):
        make_client(tool_call_parser="none such")


def test_auto_finds_calls_in_the_text(auto, engine):
    engine.pieces = ["I will. ", "<tool_", "call>", '{"name": "add", "argu', 'ments": {"x": 1}}']
    engine.pieces += ["</tool_call>"]
    found, reason = message(auto)
    assert pairs(found["tool_calls"]) == [("add", {"x": 1})]
    assert (found["content"] or "").strip() == "I will."
    assert reason == "tool_calls"
    assert "tools:add,ask" in engine.asked[0].prompt["prompt"]
    text, (call,), reason = streamed(auto)
    assert text.strip() == "I will."
    assert (call["name"], json.loads(call["arguments"])) == ("add", {"x": 1})
    assert reason == "tool_calls"


def test_auto_without_a_call_is_text(auto):
    found, reason = message(auto)
    assert (found["content"], reason) == ("Hello wörld!", "stop")
    assert "tool_calls" not in found
    assert streamed(auto) == ("Hello wörld!", [], "stop")


def test_markers_that_are_special_tokens_are_kept(make_client, engine):
    client = make_client(enable_auto_tool_choice=True, tool_call_parser="mistral")
    engine.pieces = ["[TOOL_CALLS]", '[{"name": "add", "arguments": {"x": 1}}]']
    found, _ = message(client)
    assert engine.asked[0].params.skip_special_tokens is False
    (call,) = found["tool_calls"]
    assert len(call["id"]) == 9, "Mistral's templates want that"


def test_none_shows_no_tools(client, engine):
    found, _ = message(client, tool_choice="none")
    assert found["content"] == "Hello wörld!"
    assert "tools:" not in engine.asked[0].prompt["prompt"]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_required_forces_a_list_of_calls(client, engine, size):
    engine.pieces = [CALLS[i : i + size] for i in range(0, len(CALLS), size)]
    expected = [("add", {"x": [1, 2]}), ("ask", {"text": 'a]}"{'})]
    found, reason = message(client, tool_choice="required")
    assert pairs(found["tool_calls"]) == expected
    assert (found["content"], reason) == (None, "tool_calls")
    structure = engine.asked[0].params.structured_outputs
    schema = json.loads(structure.json)
    assert schema["minItems"] == 1
    names = [kind["properties"]["name"]["enum"] for kind in schema["items"]["anyOf"]]
    assert names == [["add"], ["ask"]]
    text, calls, reason = streamed(client, tool_choice="required")
    assert [(c["name"], json.loads(c["arguments"])) for c in calls] == expected
    assert (text, reason) == ("", "tool_calls")


def test_one_call_only(client, engine):
    engine.pieces = list(CALLS)
    fields = {"tool_choice": "required", "parallel_tool_calls": False}
    found, _ = message(client, **fields)
    assert pairs(found["tool_calls"]) == [("add", {"x": [1, 2]})]
    assert len(streamed(client, **fields)[1]) == 1
    assert json.loads(engine.asked[0].params.structured_outputs.json)["maxItems"] == 1


def test_a_named_function_gets_its_arguments(client, engine):
    engine.pieces = ['{"te', 'xt": "a"}']
    found, reason = message(client, tool_choice=NAMED)
    assert pairs(found["tool_calls"]) == [("ask", {"text": "a"})]
    assert reason == "stop", "as OpenAI has it"
    schema = json.loads(engine.asked[0].params.structured_outputs.json)
    assert schema["properties"] == {"text": {"type": "string"}}
    assert schema["additionalProperties"] is False
    _, (call,), reason = streamed(client, tool_choice=NAMED)
    assert (call["name"], call["arguments"], reason) == ("ask", '{"text": "a"}', "stop")


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_calls_are_forced_in_the_form_of_the_parser(auto, engine, choice):
    engine.pieces = ['<tool_call>\n{"name": "ask", ', '"arguments": {"text": "a"}}\n</tool_call>']
    found, reason = message(auto, tool_choice=choice)
    assert pairs(found["tool_calls"]) == [("ask", {"text": "a"})]
    assert reason == ("tool_calls" if choice == "required" else "stop")
    grammar = engine.asked[0].params.structured_outputs.grammar
    assert "ask" in grammar
    assert ('\\"add\\"' in grammar) == (choice == "required")
    _, (call,), _ = streamed(auto, tool_choice=choice)
    assert (call["name"], json.loads(call["arguments"])) == ("ask", {"text": "a"})


def test_answer_cut_short_by_length_says_so(client, engine):
    engine.pieces, engine.finish_reason = ['[{"name":"add","arguments":{"x"'], "length"
    found, reason = message(client, tool_choice="required")
    assert reason == "length"
    assert found["tool_calls"][0]["function"]["arguments"] == '{"x"'


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": None, "tool_choice": "auto"}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": None, "parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"tools": []}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
        (
            {"tool_choice": "required", "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"type": "string"}},
                    }
                ],
            },
            "tools",
        ),
    ],
)
def test_wrong_tools_are_refused(client, fields, param):
    answer = post(client, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_strict_needs_a_forced_call(auto):
    strict = {"type": "function", "function": {"name": "f", "strict": True}}
    assert post(auto, tools=[strict]).json()["error"]["param"] == "tools"


@pytest.mark.parametrize("parameters", [{"additionalProperties": True}, {"anyOf": []}])
def test_functions_may_take_more_than_they_declare_if_they_say_so(client, engine, parameters):
    engine.pieces = ["{}"]
    one = {"type": "function", "function": {"name": "ask", "parameters": parameters}}
    message(client, tools=[one], tool_choice=NAMED)
    schema = json.loads(engine.asked[0].params.structured_outputs.json)
    assert schema == parameters | {"type": "object"}


def test_shared_definitions_move_to_the_root(client, engine):
    def with_definition(name, kind):
        one = tool(name, x={"$ref": "#/$defs/D"})
        one["function"]["parameters"]["$defs"] = {"D": {"type": kind}}
        return one

    engine.pieces = [CALLS]
    same = [with_definition("add", "integer"), with_definition("ask", "integer")]
    message(client, tools=same, tool_choice="required")
    schema = json.loads(engine.asked[0].params.structured_outputs.json)
    assert schema["$defs"] == {"D": {"type": "integer"}}
    differing = [with_definition("add", "integer"), with_definition("ask", "string")]
    assert "agree" in post(client, tools=differing, tool_choice="required").text


@pytest.mark.parametrize("stream", [CallListStream, lambda: NamedCallStream("f")])
def test_readers_of_forced_calls_find_nothing_in_nothing(stream):
    reader = stream()
    assert reader.push("") == reader.finish() == []


def test_names_may_have_spaces_around_them():
    reader = CallListStream()
    text = '[ {"name" : "add", "arguments" : { "x": 1 } } ]'
    parsed = collect(reader.push(text))
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == [("add", '{ "x": 1 }')]
