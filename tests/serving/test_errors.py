import json
import threading

import pytest
import sse
from starlette.testclient import TestClient

from jpaged.serving import request_body
from jpaged.serving.app import create_app
from jpaged.serving.engine import EngineDeadError, QueueFullError
from jpaged.serving.protocol import REFUSED
from jpaged.serving.request_body import decode_json
from jpaged.serving.settings import ServerSettings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


def error_of(answer, status=400):
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    assert "/work" not in answer.text
    assert ".py" not in answer.text
    return body["error"]


BODIES = {
    COMPLETIONS: {"prompt": "a"},
    CHAT: {"messages": USER},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", [*REFUSED, "no_such_field"])
def test_unsupported_field_is_refused_by_name(client, engine, path, name):
    error = error_of(client.post(path, json=BODIES[path] | {name: 1}))
    assert error["message"].startswith(f"{name} is not supported: ")
    assert error["param"] == name
    assert error["code"] == "unsupported_field"
    assert not engine.asked


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 129, "max_tokens": 1}, "n"),
        ({"n": True}, "n"),
        ({"n": "1"}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"top_k": 10**30}, "top_k"),
        ({"priority": -(10**30)}, "priority"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids[0]"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 10**400}, "top_p"),
        ({"prompt": [96]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [5] * 128}, "prompt"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": [str(i) for i in range(65)]}, "stop"),
        ({"stop_token_ids": [5] * 257}, "stop_token_ids"),
        ({"bad_words": [str(i) for i in range(257)]}, "bad_words"),
        ({"stop": "\x00" * 3, "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": None}}, "logit_bias.1"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logprobs": -2}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 2**31}, "prompt_logprobs"),
        ({"n": 17, "seed": 1}, "n"),
        ({"stop_token_ids": [96]}, "stop_token_ids"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 200, "use_beam_search": True}, "best_of"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"use_beam_search": True, "temperature": 1.0}, "temperature"),
        ({"use_beam_search": True, "stream": True}, "stream"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 2}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": True}}, "stream_options.x"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ({"stream_interval": 2}, "stream_interval"),
        ({"stream": True, "stream_interval": 0}, "stream_interval"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 128}, "truncate_prompt_tokens"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"truncation_side": "up"}, "truncation_side"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"name": "a"}}},
            "response_format.json_schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"model": 1}, "model"),
        ({"echo": 1}, "echo"),
    ],
)
def test_wrong_value_is_refused_by_name(client, engine, fields, param):
    error = error_of(client.post(COMPLETIONS, json={"prompt": "a"} | fields))
    assert error["param"] == param
    assert param.partition(".")[0].partition("[")[0] in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not engine.asked


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nothing",
        b'{"prompt": "a"} more',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"\xef\xbb\xbf{}",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "a", "chat_template_kwargs": ' + b'{"a":' * 101 + b"1" + b"}" * 102,
    ],
)
def test_what_is_no_json_is_refused(client, raw):
    answer = client.post(CHAT, content=raw, headers={"Content-Type": "application/json"})
    assert error_of(answer)["code"] == "invalid_json"


def test_large_bodies_are_read_in_a_thread(client, monkeypatch):
    names = []

    def decode(raw):
        names.append(threading.current_thread().name)
        return decode_json(raw)

    monkeypatch.setattr(request_body, "decode_json", decode)
    for num in (10, request_body.INLINE_BYTES + 1):
        error_of(client.post(COMPLETIONS, json={"prompt": [5] * num, "truncation_side": "left"}))
    small, large = names
    assert large.startswith("asyncio_")
    assert not small.startswith("asyncio_")


@pytest.mark.parametrize("raw", [b"[]", b'"a"', b"1", b"null"])
def test_body_must_be_an_object(client, raw):
    answer = client.post(CHAT, content=raw, headers={"Content-Type": "application/json"})
    assert "must be a JSON object" in error_of(answer)["message"]


def test_what_a_client_sent_does_not_come_back_at_length(client):
    error = error_of(client.post(COMPLETIONS, json={"prompt": "a", "stop": {"x": "y" * 10_000}}))
    assert len(error["message"]) < 200
    error = error_of(client.post(COMPLETIONS, json={"prompt": "a", "q" * 10_000: 1}))
    assert len(error["message"]) <= 500


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ValueError("prompt must have at most 8 tokens, got 9"), 400, None),
        (QueueFullError("too much waits", retry_after_s=7), 503, "queue_full"),
        (EngineDeadError("secret of /work"), 500, "engine_dead"),
        (RuntimeError("secret of /work"), 500, None),
        (UnicodeDecodeError("utf-8", b"secret", 0, 1, "/work"), 500, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine_have_their_status(
    client, engine, caplog, error, status, code, stream
):
    engine.error = error
    answer = client.post(COMPLETIONS, json={"prompt": "a", "stream": stream})
    told = error_of(answer, status)
    assert told["code"] == code
    assert "secret" not in answer.text
    if status == 503:
        assert answer.headers["Retry-After"] == "7"
    if status == 400:
        assert told["param"] == "prompt"
    assert bool(caplog.records) == (status == 500), "what is our fault is logged"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_error_within_a_stream_is_an_event(client, engine, caplog, path):
    engine.error, engine.error_after = EngineDeadError("secret"), 2
    answer = client.post(path, json=BODIES[path] | {"stream": True})
    assert answer.status_code == 200
    *chunks, last = sse.parse(answer.content)
    assert last == {
        "error": {
            "message": "the engine has ended",
            "type": "server_error",
            "param": None,
            "code": "engine_dead",
        }
    }
    assert all("error" not in chunk for chunk in chunks)
    assert engine.asked[0].was_cut


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_server_ended_is_no_answer(client, engine, stream):
    engine.finish_reason = "abort"
    answer = client.post(COMPLETIONS, json={"prompt": "a", "stream": stream})
    error = sse.parse(answer.content)[-1]["error"] if stream else error_of(answer, 503)
    assert error["code"] == "aborted"


def test_one_failed_prompt_ends_the_others(client, engine):
    engine.error, engine.error_after = QueueFullError("full"), 1
    answer = client.post(COMPLETIONS, json={"prompt": ["a", "b", "c"], "stream": True})
    assert sse.parse(answer.content)[-1]["error"]["code"] == "queue_full"
    assert all(asked.was_cut and not asked.is_open for asked in engine.asked)
    engine.asked.clear()
    engine.error_after = 0
    error_of(client.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]}), 503)
    assert not any(asked.is_open for asked in engine.asked)


def test_too_many_prompts_are_refused(make_client):
    client = make_client(max_prompts=2)
    for fields in ({"prompt": ["a", "b", "c"]}, {"prompt": ["a", "b"], "n": 2}):
        assert error_of(client.post(COMPLETIONS, json=fields))["param"] == "prompt"
    assert client.post(COMPLETIONS, json={"prompt": ["a", "b"]}).status_code == 200


def test_unknown_paths_and_methods(client):
    assert error_of(client.get("/nothing"), 404)["type"] == "not_found_error"
    answer = client.get(COMPLETIONS)
    error_of(answer, 405)
    assert answer.headers["Allow"] == "POST"


def test_a_dead_engine_shows_in_health(client, engine):
    assert client.get("/health").status_code == client.post("/ping").status_code == 200
    engine.dead = EngineDeadError("secret")
    for path in ("/health", "/ping"):
        assert error_of(client.get(path), 503)["code"] == "engine_dead"


def test_what_nobody_foresaw_is_a_plain_500(engine, caplog):
    engine.dead = KeyError("secret of /work")
    with TestClient(create_app(engine, ServerSettings())) as client:
        answer = client.get("/health")
    assert error_of(answer, 500)["message"] == "internal server error"
    assert "secret" not in answer.text
    assert "secret" in caplog.text


def test_system_routes(client, engine):
    assert client.get("/version").json()["version"].startswith("0.")
    assert client.get("/load").json() == {"server_load": 0}
    assert client.get("/pool").json() == {"block_size": 8}
    assert client.get("/docs").status_code == 200
    assert client.get("/openapi.json").json()["info"]["title"] == "jpaged"


def test_docs_can_be_left_out(make_client):
    client = make_client(disable_fastapi_docs=True)
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert client.get(path).status_code == 404


def test_cors_is_off_unless_asked_for(client, make_client):
    asking = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert client.options(COMPLETIONS, headers=asking).status_code == 405
    assert "access-control-allow-origin" not in client.get("/version", headers=asking).headers
    open_to = make_client(allowed_origins=("https://a.example",), api_keys=("secret",))
    answer = open_to.options(COMPLETIONS, headers=asking)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    refused = open_to.get("/version", headers=asking)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    other = asking | {"Origin": "https://b.example"}
    assert open_to.options(COMPLETIONS, headers=other).status_code == 400


def test_request_ids_in_answers(make_client):
    plain, telling = make_client(), make_client(enable_request_id_headers=True)
    assert "x-request-id" not in plain.get("/version").headers
    given = {"X-Request-Id": "mine"}
    assert telling.get("/version", headers=given).headers["X-Request-Id"] == "mine"
    assert len(telling.get("/version").headers["X-Request-Id"]) == 32
    evil = {"X-Request-Id": "a b"}
    assert telling.get("/version", headers=evil).headers["X-Request-Id"] != "a b"
    answer = telling.post(COMPLETIONS, json={"prompt": "a"}, headers=evil)
    assert error_of(answer)["param"] == "X-Request-Id"
    answer = telling.post(COMPLETIONS, json={"prompt": "a", "request_id": "own"}, headers=given)
    assert answer.headers["X-Request-Id"] == "own"
    assert json.loads(answer.content)["id"] == "cmpl-own"
