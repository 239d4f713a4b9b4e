import json

import pytest
import sse

PATH = "/v1/chat/completions"
TEXT = "Hello wörld!"
USER = [{"role": "user", "content": "hi"}]


def ask(client, **fields):
    answer = client.post(PATH, json={"messages": USER} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client, **fields):
    answer = client.post(PATH, json={"messages": USER, "stream": True} | fields)
    assert answer.status_code == 200, answer.text
    return sse.parse(answer.content)


def refused(client, status=400, **fields):
    answer = client.post(PATH, json={"messages": USER} | fields)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def prompt_of(engine):
    return engine.asked[-1].prompt["prompt"]


def test_answer_has_openais_form(client, engine):
    answer = ask(client)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert prompt_of(engine) == "<user>hi</s><assistant>"
    assert engine.asked[0].params.max_tokens is None


def test_stream_adds_up_to_the_answer(client):
    events = stream(client, n=2, stream_options={"include_usage": True})
    *chunks, last = events
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    texts, roles, reasons = {}, [], []
    for event in chunks:
        (choice,) = event["choices"]
        delta = choice["delta"]
        roles += [delta["role"]] if "role" in delta else []
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        texts[choice["index"]] = texts.get(choice["index"], "") + delta.get("content", "")
    assert texts == {0: TEXT, 1: TEXT}
    assert roles == ["assistant"] * 2
    assert reasons == ["stop"] * 2
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8


def test_content_may_be_parts_of_text(client, engine):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask(client, messages=[{"role": "user", "content": parts}])
    assert prompt_of(engine) == "<user>a\nb</s><assistant>"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file"])
def test_other_parts_are_refused_by_name(client, kind):
    error = refused(client, messages=[{"role": "user", "content": [{"type": kind, kind: {}}]}])
    assert error["param"] == "messages[0].content[0]"
    assert kind in error["message"]
    assert "text only" in error["message"]


def test_what_was_answered_can_be_sent_back(client, engine):
    message = ask(client)["choices"][0]["message"]
    ask(client, messages=[*USER, message, *USER])
    assert prompt_of(engine) == f"<user>hi</s><assistant>{TEXT}</s><user>hi</s><assistant>"


def test_developer_is_system(client, engine):
    ask(client, messages=[{"role": "developer", "content": "be"}, *USER])
    assert prompt_of(engine).startswith("<system>be</s>")


def test_calls_and_their_results_reach_the_template(client, engine):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    ask(
        client,
        messages=[
            *USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ],
    )
    assert "<assistant>[f[('x', 1)]]</s><tool>2</s>" in prompt_of(engine)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user"}, "needs content"),
        ({"role": "user", "content": "a", "tool_call_id": "1"}, "needs tool_call_id"),
        ({"role": "tool", "content": "a"}, "needs tool_call_id"),
        ({"role": "", "content": "a"}, "role must"),
        ({"role": "user", "content": "a", "weight": 1}, "weight is not supported"),
        ({"content": "a"}, "role is required"),
        (
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}
                ],
            },
            "must be a JSON object",
        ),
    ],
)
def test_wrong_messages_are_refused(client, message, text):
    error = refused(client, messages=[message])
    assert text in error["message"]
    assert error["param"].startswith("messages[0]")


def test_no_messages_are_refused(client):
    assert refused(client, messages=[])["param"] == "messages"


def test_last_message_is_continued(client, engine):
    messages = [*USER, {"role": "assistant", "content": "Sure, "}]
    ask(client, messages=messages, continue_final_message=True)
    assert prompt_of(engine) == "<user>hi</s><assistant>Sure,"
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert "must not both" in refused(client, messages=messages, **both)["message"]
    ask(client, add_generation_prompt=False)
    assert prompt_of(engine) == "<user>hi</s>"


def test_template_variables(client, engine):
    ask(client, chat_template_kwargs={"style": "short"})
    assert "style:short" in prompt_of(engine)
    for name in ("messages", "bos_token", "not a name"):
        error = refused(client, chat_template_kwargs={name: 1})
        assert error["param"] == "chat_template_kwargs"


def test_request_templates_need_trust(client, make_client, engine):
    assert refused(client, chat_template="x")["param"] == "chat_template"
    trusting = make_client(trust_request_chat_template=True)
    ask(trusting, chat_template="{{ messages[0].content }}!")
    assert prompt_of(engine) == "hi!"
    error = refused(trusting, chat_template="{{ ''.__class__.__mro__ }}")
    assert "chat_template" in error["message"]
    assert "not a valid template" in refused(trusting, chat_template="{% x")["message"]


def test_servers_template(make_client, engine):
    ask(make_client(chat_template="T:{{ messages[0].content }}"))
    assert prompt_of(engine) == "T:hi"


def test_response_role(make_client):
    client = make_client(response_role="bot")
    assert ask(client)["choices"][0]["message"]["role"] == "bot"
    assert stream(client)[0]["choices"][0]["delta"]["role"] == "bot"


@pytest.mark.parametrize("num_top", [None, 2])
def test_logprobs(client, engine, num_top):
    fields = {"logprobs": True} | ({} if num_top is None else {"top_logprobs": num_top})
    content = ask(client, **fields)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["Hel", "lo", " wörld", "!"]
    assert content[2]["bytes"] == list(" wörld".encode())
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["o0", "o1"][: num_top or 0]
    streamed = [e["choices"][0]["logprobs"] for e in stream(client, **fields)]
    assert [entry for part in streamed if part for entry in part["content"]] == content


def test_top_logprobs_need_logprobs(client):
    assert refused(client, top_logprobs=2)["param"] == "top_logprobs"


def test_max_tokens_has_two_names(client, engine):
    ask(client, max_completion_tokens=5)
    ask(client, max_tokens=6)
    ask(client, max_tokens=7, max_completion_tokens=7)
    assert [asked.params.max_tokens for asked in engine.asked] == [5, 6, 7]
    assert refused(client, max_tokens=7, max_completion_tokens=8)["param"] == "max_tokens"


def test_token_ids_are_returned_if_asked_for(client, tokenizer):
    prompt = tokenizer.encode("<user>hi</s><assistant>", add_special_tokens=False)
    answer = ask(client, return_token_ids=True)
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == [10, 11, 12, 13]
    first, *rest = stream(client, return_token_ids=True)
    assert first["prompt_token_ids"] == prompt
    assert [t for e in rest for t in e["choices"][0]["token_ids"]] == [10, 11, 12, 13]


def test_prompt_logprobs(client):
    assert ask(client, prompt_logprobs=0)["prompt_logprobs"][0] is None


def test_json_schema_reaches_the_engine(client, engine):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    ask(client, response_format=form)
    assert json.loads(engine.asked[0].params.structured_outputs.json) == schema


def test_tokenize_sees_what_chat_sees(client, engine):
    fields = {"messages": USER, "chat_template_kwargs": {"style": "x"}}
    ask(client, **fields)
    answer = client.post("/tokenize", json=fields | {"return_token_strs": True}).json()
    ids = engine.asked[0].prompt["prompt_token_ids"]
    assert answer["tokens"] == ids
    assert answer["count"] == len(ids) == len(answer["token_strs"])
    assert answer["max_model_len"] == 128


def test_detokenize_undoes_tokenize(client):
    tokens = client.post("/tokenize", json={"prompt": "the sea 🙂"}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "the sea 🙂"}


def test_tokenize_takes_one_of_two(client):
    for body in ({}, {"prompt": "a", "messages": USER}, {"prompt": "a", "tools": []}):
        assert client.post("/tokenize", json=body).status_code == 400
    answer = client.post("/tokenize", json={"prompt": "a", "add_special_tokens": False}).json()
    assert answer["count"] == 1
    assert answer["token_strs"] is None
    assert client.post("/detokenize", json={"tokens": [96]}).status_code == 400
