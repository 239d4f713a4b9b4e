import asyncio
import dataclasses
import threading

import pytest
import sse

from jpaged.sampling_params import RequestOutputKind
from jpaged.serving.prompt_reader import INLINE_CHARS, PromptReader

PATH = "/v1/completions"
TEXT = "Hello wörld!"


def ask(client, **fields):
    answer = client.post(PATH, json={"prompt": "the sea"} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client, **fields):
    answer = client.post(PATH, json={"prompt": "the sea", "stream": True} | fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return sse.parse(answer.content)


def test_answer_has_openais_form(client, engine, tokenizer):
    answer = ask(client)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    num_prompt = len(tokenizer.encode("the sea"))
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 4,
        "total_tokens": num_prompt + 4,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    (asked,) = engine.asked
    assert asked.prompt == {"prompt": "the sea", "prompt_token_ids": tokenizer.encode("the sea")}
    assert asked.params.max_tokens == 16
    assert asked.params.output_kind is RequestOutputKind.FINAL_ONLY


def test_stream_adds_up_to_the_answer(client, engine):
    events = stream(client)
    assert [e["choices"][0]["text"] for e in events] == ["Hel", "lo", " wörld", "!"]
    assert [e["choices"][0]["finish_reason"] for e in events] == [None, None, None, "stop"]
    assert {e["object"] for e in events} == {"text_completion"}
    assert len({(e["id"], e["created"], e["model"]) for e in events}) == 1
    assert all("usage" not in e for e in events)
    assert engine.asked[0].params.output_kind is RequestOutputKind.DELTA


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (["a", "b"], [[3], [4]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_prompt_may_have_four_forms(client, engine, tokenizer, prompt, expected):
    answer = ask(client, prompt=prompt, n=2, seed=1)
    if isinstance(prompt[0], str):
        expected = [tokenizer.encode(text) for text in prompt]
    assert [asked.prompt["prompt_token_ids"] for asked in engine.asked] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
    assert answer["usage"]["completion_tokens"] == 8 * len(expected)


def test_streams_of_several_prompts_are_told_apart(client):
    events = stream(client, prompt=["a", "b"], n=2, stream_options={"include_usage": True})
    *chunks, last = events
    texts = {}
    for event in chunks:
        (choice,) = event["choices"]
        assert event["usage"] is None
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == dict.fromkeys(range(4), TEXT)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 16
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


def test_usage_may_be_told_in_every_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = stream(client, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in chunks] == [1, 2, 3, 4]
    assert last["usage"]["completion_tokens"] == 4


def test_usage_may_be_forced(make_client):
    client = make_client(enable_force_include_usage=True)
    assert stream(client)[-1]["usage"]["completion_tokens"] == 4
    events = stream(client, stream_options={"include_usage": False})
    assert all("usage" not in event for event in events)


def test_echo_puts_the_prompt_first(client):
    assert ask(client, echo=True)["choices"][0]["text"] == "the sea" + TEXT
    texts = [event["choices"][0]["text"] for event in stream(client, echo=True)]
    assert texts == ["the seaHel", "lo", " wörld", "!"]


def test_echo_shows_the_text_of_token_ids(client, tokenizer):
    ids = tokenizer.encode("the sea")
    assert ask(client, prompt=ids, echo=True)["choices"][0]["text"] == "the sea" + TEXT


@pytest.mark.parametrize("logprobs", [0, 2])
def test_logprobs_of_the_output(client, logprobs):
    found = ask(client, logprobs=logprobs)["choices"][0]["logprobs"]
    assert found["tokens"] == ["Hel", "lo", " wörld", "!"]
    assert found["text_offset"] == [0, 3, 5, 11]
    assert found["token_logprobs"] == [-0.5 if logprobs == 0 else -9.0] * 4
    assert [len(top) for top in found["top_logprobs"]] == [logprobs + 1] * 4
    parts = [event["choices"][0]["logprobs"] for event in stream(client, logprobs=logprobs)]
    joined = {key: [x for part in parts for x in part[key]] for key in found}
    assert joined == found


@pytest.mark.parametrize("max_tokens", [4, 0])
def test_echo_with_logprobs_scores_the_prompt(client, engine, max_tokens):
    answer = ask(client, prompt=[5, 6, 7], echo=True, logprobs=1, max_tokens=max_tokens)
    found = answer["choices"][0]["logprobs"]
    assert found["token_logprobs"][:3] == [None, -9.0, -9.0]
    assert found["tokens"][1:3] == ["<6>", "<7>"]
    assert len(found["tokens"]) == 3 + max_tokens
    assert answer["usage"]["completion_tokens"] == max_tokens
    assert engine.asked[0].params.prompt_logprobs == 1
    (first, *_) = stream(client, prompt=[5, 6, 7], echo=True, logprobs=1, max_tokens=max_tokens)
    assert first["choices"][0]["logprobs"]["tokens"][1:3] == ["<6>", "<7>"]


def test_echo_of_nothing_but_the_prompt_ends_by_length(client):
    (choice,) = ask(client, echo=True, max_tokens=0)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the sea", "length")


def test_prompt_logprobs_come_as_vllm_gives_them(client):
    (choice,) = ask(client, prompt=[5, 6], prompt_logprobs=1)["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second["6"] == {"logprob": -9.0, "rank": 2, "decoded_token": "<6>"}


def test_token_ids_are_returned_if_asked_for(client):
    answer = ask(client, prompt=[5, 6], return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == [10, 11, 12, 13]
    assert answer["choices"][0]["prompt_token_ids"] == [5, 6]
    events = stream(client, prompt=[5, 6], return_token_ids=True)
    assert [e["choices"][0]["token_ids"] for e in events] == [[10], [11], [12], [13]]
    assert [e["choices"][0].get("prompt_token_ids") for e in events] == [[5, 6], None, None, None]


def test_tokens_may_be_shown_by_their_ids(client, make_client):
    expected = [f"token_id:{i}" for i in range(10, 14)]
    shown = ask(client, logprobs=0, return_tokens_as_token_ids=True)
    assert shown["choices"][0]["logprobs"]["tokens"] == expected
    always = make_client(return_tokens_as_token_ids=True)
    assert ask(always, logprobs=0)["choices"][0]["logprobs"]["tokens"] == expected


def test_stream_interval_puts_tokens_together(client):
    events = stream(client, stream_interval=2, logprobs=0)
    assert [event["choices"][0]["text"] for event in events] == ["Hel", "lo wörld", "!"]
    assert [len(event["choices"][0]["logprobs"]["tokens"]) for event in events] == [1, 2, 1]


def test_tokens_without_text_are_not_told(client, engine):
    engine.pieces = ["a", "", "b"]
    assert [event["choices"][0]["text"] for event in stream(client)] == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncate_prompt_tokens": 2}, [7, 8]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, [7, 8]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [5, 6]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 125}, [6, 7, 8]),
        ({"truncate_prompt_tokens": 9}, [5, 6, 7, 8]),
    ],
)
def test_prompts_are_truncated(client, engine, fields, expected):
    ask(client, prompt=[5, 6, 7, 8], **fields)
    assert engine.asked[0].prompt["prompt_token_ids"] == expected


def test_every_sampling_field_arrives(client, engine):
    fields = {
        "n": 2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.25,
        "seed": 7,
        "stop": ["x"],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "max_tokens": 9,
        "min_tokens": 3,
        "logprobs": 1,
        "prompt_logprobs": 1,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
        "allowed_token_ids": [1, 2],
        "bad_words": ["bad"],
    }
    ask(client, logit_bias={"5": 2}, cache_salt="pepper", priority=3, **fields)
    (asked,) = engine.asked
    for name, value in fields.items():
        given = getattr(asked.params, name)
        assert (list(given) if isinstance(given, tuple) else given) == value, name
    assert asked.params.logit_bias == {5: 2.0}
    assert asked.prompt["cache_salt"] == "pepper"
    assert asked.priority == 3


def test_the_models_sampling_holds_where_it_is_left_open(client, engine):
    engine.info = dataclasses.replace(
        engine.info, default_sampling={"temperature": 0.6, "top_k": 5}
    )
    ask(client, top_k=7)
    ask(client, temperature=0.0)
    ask(client, use_beam_search=True, n=2)
    asked = [(one.params.temperature, one.params.top_k) for one in engine.asked]
    assert asked == [(0.6, 7), (0.0, 5), (0.0, 0)]


def test_beam_search_is_greedy_by_itself(client, engine):
    fields = {"use_beam_search": True, "n": 2, "best_of": 3, "length_penalty": 0.5}
    ask(client, early_stopping="never", **fields)
    params = engine.asked[0].params
    assert (params.temperature, params.best_of, params.n) == (0.0, 3, 2)
    assert (params.length_penalty, params.early_stopping) == (0.5, "never")


def test_best_of_n_is_nothing_special(client, engine):
    ask(client, best_of=2, n=2)
    assert engine.asked[0].params.best_of is None


def test_nulls_are_as_fields_left_out(client, engine):
    ask(client, temperature=None, stop=None, stream=None, response_format=None)
    assert engine.asked[0].params.temperature == 1.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {}},
                }
            },
            {"json": "{}"},
        ),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ("a", "b")}),
        ({"structured_outputs": {"grammar": "start: A"}}, {"grammar": "start: A"}),
    ],
)
def test_structure_arrives(client, engine, fields, expected):
    ask(client, **fields)
    structure = engine.asked[0].params.structured_outputs
    for name, value in expected.items():
        got = getattr(structure, name)
        assert (tuple(got) if isinstance(got, list) else got) == value


def test_text_is_no_structure(client, engine):
    ask(client, response_format={"type": "text"})
    assert engine.asked[0].params.structured_outputs is None


def test_model_names(make_client):
    client = make_client(served_model_names=("one", "two"))
    assert ask(client, model="two")["model"] == "two"
    assert ask(client)["model"] == "one"
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["one", "two"]
    assert client.get("/v1/models/two").json()["max_model_len"] == 128
    for answer in (
        client.get("/v1/models/three"),
        client.post(PATH, json={"prompt": "a", "model": "three"}),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


def test_id_comes_from_body_or_header_or_nowhere(client, engine):
    assert ask(client, request_id="mine")["id"] == "cmpl-mine"
    answer = client.post(PATH, json={"prompt": "a"}, headers={"X-Request-Id": "theirs"})
    assert answer.json()["id"] == "cmpl-theirs"
    ask(client, request_id="mine")
    assert len({asked.request_id for asked in engine.asked}) == 3, "the engine's are unique"


def test_a_text_that_cannot_fit_is_refused_unread(client, engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "encode", lambda *_: pytest.fail("it was read"))
    answer = client.post(PATH, json={"prompt": "a" * 5000})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_long_texts_are_read_off_the_event_loop(tokenizer, monkeypatch):
    reader = PromptReader(tokenizer, max_model_len=1000, vocab_size=96)
    names = []

    def read(text, special):
        names.append(threading.current_thread().name)
        return [5]

    monkeypatch.setattr(tokenizer, "encode", read)

    async def run():
        for num in (INLINE_CHARS, INLINE_CHARS + 1):
            await reader.encode("a" * num, add_special_tokens=True, field="prompt")

    asyncio.run(run())
    assert names[0] == threading.main_thread().name != names[1]


def test_a_model_without_tokenizer_takes_token_ids_only(engine, make_client):
    engine.tokenizer = None
    client = make_client()
    assert ask(client, prompt=[5, 6])["choices"][0]["text"] == TEXT
    answer = client.post(PATH, json={"prompt": "a"})
    assert answer.status_code == 400
    assert "no tokenizer" in answer.json()["error"]["message"]
