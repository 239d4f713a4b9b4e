"""`jpaged chat` with the engine in the process."""

from typing import Any

import pytest
from fake_llm import FakeTokenizer, press_ctrl_c

from jpaged import cli
from jpaged.cli import engine


def test_chat_remembers_until_reset(llms, stdin, capsys):
    stdin("one\n\ntwo\n/reset\nthree\n")
    assert cli.main(["chat", "--system", "S"]) == 0
    assert capsys.readouterr().out == "Hello wörld!\n" * 3
    assert [prompt["prompt"] for prompt, _ in llms[0].requests] == [
        "<system>S<user>one",
        "<system>S<user>one<assistant>Hello wörld!<user>two",
        "<system>S<user>three",
    ]
    params = llms[0].requests[0][1]
    assert (params.max_tokens, params.temperature) == (512, 0.7)
    assert llms[0].options == {"compilation": "lazy"}
    assert llms[0].is_shut_down


def test_chat_commands(llms, stdin, capsys):
    stdin("/help\n/huh me\n/exit\nnever read\n")
    assert cli.main(["chat"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "/reset  forget" in captured.err
    assert "unknown command /huh, see /help" in captured.err
    assert llms[0].requests == []


def test_refused_message_is_not_remembered(llms, stdin, capsys):
    stdin("too long\nshort\n")
    assert cli.main(["chat", "--stats"]) == 0
    error, stats = capsys.readouterr().err.splitlines()
    assert error == "jpaged: error: prompt must be at most 8 tokens, got 9 (/reset starts anew)"
    assert stats.startswith("jpaged: 3 prompt tokens")
    assert [prompt["prompt"] for prompt, _ in llms[0].requests] == ["<user>short"]


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_cuts_only_the_answer(llms, stdin, monkeypatch, capsys):
    make: Any = engine.make_llm

    def make_llm(options):
        llm = make(options)
        llm.on_piece = lambda: len(llm.requests) == 1 and press_ctrl_c()
        return llm

    monkeypatch.setattr(engine, "make_llm", make_llm)
    stdin("one\ntwo\n")
    assert cli.main(["chat"]) == 0
    assert llms[0].num_streams_closed_early == 1
    answer = llms[0].requests[1][0]["prompt"].split("<")[2]
    assert answer in ("assistant>Hello", "assistant>Hello wörld")
    assert capsys.readouterr().out.endswith("Hello wörld!\n")


def test_chat_needs_a_template(llms, stdin, monkeypatch, capsys):
    monkeypatch.setattr(FakeTokenizer, "chat_template", None)
    assert cli.main(["chat"]) == 2
    assert "chat needs a model with a chat template" in capsys.readouterr().err
