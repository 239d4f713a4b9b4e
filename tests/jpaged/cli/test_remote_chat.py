"""`jpaged chat --url` with a small server."""

import pytest
from fake_openai import FakeOpenAI, listening

from jpaged import cli
from jpaged.cli import remote_chat, streaming


@pytest.fixture
def server():
    fake = FakeOpenAI()
    with listening(fake.app) as fake.base_url:
        yield fake


@pytest.fixture
def chat(server, stdin):
    """Says these lines to the server."""

    def run(text: str, *arguments: str) -> int:
        stdin(text)
        return cli.main(["chat", "--url", server.base_url, "--max-tokens", "3", *arguments])

    return run


def test_conversation_is_remembered_until_reset(chat, server, capsys):
    assert chat("one\ntwo\n/reset\nthree\n", "--system", "S") == 0
    assert capsys.readouterr().out == "w0 w1 w2 \n" * 3
    system = {"role": "system", "content": "S"}
    assert [body["messages"] for body in server.bodies] == [
        [system, {"role": "user", "content": "one"}],
        [
            system,
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "w0 w1 w2 "},
            {"role": "user", "content": "two"},
        ],
        [system, {"role": "user", "content": "three"}],
    ]


def test_body_and_key(chat, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of the environment")
    options = ["--top-p", "0.5", "--stop", "x", "--ignore-eos", "--seed", "3"]
    assert chat("hi\n", *options, "--model-name", "other", "--api-key", "secret") == 0
    assert chat("hi\n") == 0
    body = server.bodies[0]
    del body["messages"]
    assert body == {
        "model": "other",
        "max_tokens": 3,
        "temperature": 0.7,
        "top_p": 0.5,
        "stop": ["x"],
        "ignore_eos": True,
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert server.headers[1]["authorization"] == "Bearer of the environment"
    assert server.bodies[1]["model"] == "fake-model"


def test_url_may_end_with_the_version(server, stdin, capsys):
    stdin("hi\n")
    assert cli.main(["chat", "--url", server.base_url + "/v1/", "--max-tokens", "1"]) == 0
    assert capsys.readouterr().out == "w0 \n"


def test_statistics(chat, capsys):
    assert chat("a b c\n", "--stats") == 0
    err = capsys.readouterr().err
    assert err.startswith("jpaged: 3 prompt tokens, first token after ")
    assert "3 tokens" in err
    assert err.endswith("ended by length\n")


def test_refused_message_is_not_remembered(chat, server, capsys):
    assert chat("REFUSE\nfine\n") == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "jpaged: error: HTTP 400: top_p must be in (0, 1] (/reset starts anew)\n"
    )
    assert captured.out == "w0 w1 w2 \n"
    assert len(server.bodies[1]["messages"]) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("BREAK", "the engine has ended"), ("CUT", "the answer was cut off")],
)
def test_broken_answer_is_told(chat, server, capsys, prompt, message):
    assert chat(f"{prompt}\nmore\n") == 0
    captured = capsys.readouterr()
    assert captured.out == "w0 \nw0 w1 w2 \n"
    assert captured.err == f"jpaged: error: {message} (/reset starts anew)\n"
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "w0 "}


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_cuts_only_the_answer(chat, server, monkeypatch, capsys):
    def show(text):
        streaming.write_text(text)
        if text:
            server.may_interrupt.set()

    monkeypatch.setattr(remote_chat, "write_text", show)
    assert chat("INTERRUPT\ntwo\n", "--stats") == 0
    captured = capsys.readouterr()
    assert captured.out == "w0 \nw0 w1 w2 \n"
    assert "ended by interrupted" in captured.err.splitlines()[0]
    assert server.was_left.wait(30)
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "w0 "}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "localhost:8000"], "--url must begin with http:// or https://"),
        (["--url", "http://x", "-m", "y"], "got --model (the server's is --model-name)"),
        (["--url", "http://x", "--block-size", "32"], "got --block-size"),
        (["--url", "http://127.0.0.1:1"], "http://127.0.0.1:1: no connection: "),
        (["--api-key", "x"], "--api-key needs --url"),
        (["--model-name", "x"], "--model-name needs --url"),
    ],
)
def test_mistake_is_one_line(arguments, message, stdin, capsys):
    assert cli.main(["chat", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_server_that_refuses_its_models(chat, server, capsys):
    server.num_model_failures = 1
    assert chat("hi\n") == 2
    assert "HTTP 503: starting" in capsys.readouterr().err


def test_other_server_is_one_line(stdin, capsys):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    with listening(app) as url:
        assert cli.main(["chat", "--url", url]) == 2
    assert "the server names no model: give --model-name" in capsys.readouterr().err
