"""The official client against a real server with a tiny model, and its types for every answer."""

import contextlib

import fake_engine
import live_server
import openai
import pytest
import tiny_text_model
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from jpaged import LLM, AsyncLLM, SamplingParams
from jpaged.serving.app import create_app
from jpaged.serving.in_process import InProcessEngine
from jpaged.serving.settings import ServerSettings

KEY = "secret"
USER = [{"role": "user", "content": "the sea"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    model = tiny_text_model.write_model(tmp_path_factory.mktemp("m") / "tiny")
    return tiny_text_model.options(model)


@pytest.fixture(scope="module")
def client(options):
    @contextlib.asynccontextmanager
    async def make_app():
        llm = AsyncLLM(**options)
        engine = InProcessEngine(llm)
        settings = ServerSettings(
            api_keys=(KEY,),
            served_model_names=("tiny",),
            chat_template=fake_engine.CHAT_TEMPLATE,
        )
        try:
            yield create_app(engine, settings)
            assert llm.stats().scheduler.blocks.used == 0
        finally:
            await engine.shutdown()

    with live_server.serving(make_app) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def offline(options, prompt, **params):
    with LLM(**options) as llm:
        return llm.generate([prompt], SamplingParams(**params), use_tqdm=False)[0].outputs


def test_completion_is_the_offline_one(client, options):
    expected = offline(options, "the sea", max_tokens=12, seed=5, n=2)
    found = client.completions.create(model="tiny", prompt="the sea", max_tokens=12, seed=5, n=2)
    assert [choice.text for choice in found.choices] == [part.text for part in expected]
    texts = ["", ""]
    chunks = client.completions.create(
        model="tiny", prompt="the sea", max_tokens=12, seed=5, n=2, stream=True
    )
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [part.text for part in expected]


def test_chat(client):
    fields = {"model": "tiny", "messages": USER, "max_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert len(choice.logprobs.content) == whole.usage.completion_tokens == 8
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options=options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert chunks[-1].usage.completion_tokens == 8


def test_helper_for_streams_builds_the_message(client):
    fields = {"model": "tiny", "messages": USER, "max_tokens": 8, "seed": 1}
    # Any token ends the answer: the client refuses answers that are cut short by length.
    fields["extra_body"] = {"stop_token_ids": list(range(96))}
    with client.chat.completions.stream(**fields) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    expected = client.chat.completions.create(**fields)
    assert final.choices[0].message.content == expected.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


def test_vllms_fields_come_through_extra_body(client):
    found = client.completions.create(
        model="tiny",
        prompt=[5, 6, 7],
        max_tokens=4,
        extra_body={"top_k": 1, "ignore_eos": True, "return_token_ids": True},
    )
    assert len(found.choices[0].token_ids) == 4


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 128


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (openai.BadRequestError, {"model": "tiny", "n": 0}),
        (openai.BadRequestError, {"model": "tiny", "suffix": "x"}),
        (openai.NotFoundError, {"model": "other"}),
    ],
)
def test_errors_are_the_clients_own(client, kind, fields):
    with pytest.raises(kind) as caught:
        client.completions.create(prompt="a", **fields)
    assert caught.value.body["message"]
    assert caught.value.type
    assert caught.value.param in fields


def test_wrong_key_is_an_authentication_error(client):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()


def test_leaving_a_stream_ends_it(client):
    with client.completions.create(model="tiny", prompt="a", max_tokens=100, stream=True) as chunks:
        next(iter(chunks))
    # What it had is free again: the fixture looks at the blocks at the end.
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices


FIELDS = [
    {},
    {"n": 2, "seed": 1},
    {"logprobs": True, "top_logprobs": 2},
    {"return_token_ids": True, "prompt_logprobs": 1},
    {"tools": [TOOL], "tool_choice": "required"},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
]


def _as_completion(fields):
    # Without echo: the first token of a prompt has no log-probability, and OpenAI's type does not
    # know the null that OpenAI's server too gives for it.
    fields = {k: v for k, v in fields.items() if not k.startswith(("tool", "top_"))}
    return fields | ({"logprobs": 2} if "logprobs" in fields else {})


@pytest.fixture
def strict(make_client, engine):
    engine.pieces = ['[{"name":"f","argum', 'ents":{"x":1}}]']
    return make_client()


@pytest.mark.parametrize("fields", FIELDS)
def test_answers_validate_against_the_clients_types(strict, fields):
    answer = strict.post("/v1/chat/completions", json={"messages": USER} | fields)
    message = ChatCompletion.model_validate_json(answer.content, strict=True).choices[0].message
    assert bool(message.tool_calls) == ("tools" in fields)
    answer = strict.post("/v1/completions", json={"prompt": "a"} | _as_completion(fields))
    assert Completion.model_validate_json(answer.content, strict=True).choices
    card = strict.get("/v1/models/tiny")
    assert Model.model_validate_json(card.content, strict=True).owned_by == "jpaged"


@pytest.mark.parametrize("fields", FIELDS)
def test_chunks_validate_against_the_clients_types(strict, fields):
    fields = {k: v for k, v in fields.items() if k != "prompt_logprobs"}
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = strict.post("/v1/chat/completions", json={"messages": USER} | fields)
    for data in _data(answer.text):
        ChatCompletionChunk.model_validate_json(data, strict=True)
    answer = strict.post("/v1/completions", json={"prompt": "a"} | _as_completion(fields))
    # OpenAI's type wants a finish reason in every chunk, which its own chunks do not have.
    for data in _data(answer.text):
        ended = data.replace('"finish_reason":null', '"finish_reason":"stop"')
        Completion.model_validate_json(ended, strict=True)


def _data(text):
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return lines
