"""`jpaged serve`: what its arguments become."""

import dataclasses
import sys
import types
from typing import Any

import pytest

from jpaged import cli
from jpaged.cli.parser import build_parser
from jpaged.cli.serve_parser import SERVER_PREFIX
from jpaged.serving.settings import ServerSettings

NAMES_OF_FLAGS = {"api_key": "api_keys", "api_key_file": "api_keys"}


@pytest.fixture
def served(monkeypatch):
    """Puts a server in place that only keeps what it was given; its exit code is 3."""
    calls = []

    def run_server(options, settings):
        calls.append((options, settings))
        return 3

    module = types.ModuleType("jpaged.serving.server")
    module.run_server = run_server  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "jpaged.serving.server", module)
    monkeypatch.delenv("JPAGED_API_KEY", raising=False)
    return calls


def run(*arguments):
    return cli.main(["serve", *arguments])


def actions():
    parser = build_parser()
    (commands,) = [a for a in parser._actions if a.dest == "command"]
    assert commands.choices is not None
    return [a for a in commands.choices["serve"]._actions if a.dest.startswith(SERVER_PREFIX)]  # pyright: ignore


def test_without_arguments_all_is_default(served):
    assert run() == 3
    assert served == [({}, ServerSettings())]


def test_arguments_are_settings_and_engine_options(served, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    run(
        "some/model",
        *("--port", "1", "--host", "::1", "--served-model-name", "a", "b"),
        *("--chat-template", str(template), "--max-num-seqs", "7", "--policy", "priority"),
        *("--disable-log-requests", "--allowed-origins", "https://a.example"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--sse-keep-alive-interval", "5", "--shutdown-timeout", "2.5"),
    )
    ((options, settings),) = served
    assert options == {"model": "some/model", "max_num_seqs": 7, "policy": "priority"}
    assert settings == ServerSettings(
        port=1,
        host="::1",
        served_model_names=("a", "b"),
        chat_template="{{ messages }}",
        enable_log_requests=False,
        allowed_origins=("https://a.example",),
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        sse_keep_alive_interval_s=5.0,
        shutdown_timeout_s=2.5,
    )


def test_keys_come_from_three_places(served, monkeypatch, tmp_path):
    file = tmp_path / "keys"
    file.write_text("three\n\n four \n")
    monkeypatch.setenv("JPAGED_API_KEY", "five")
    run("--api-key", "one", "--api-key", "two", "--api-key-file", str(file))
    assert served[0][1].api_keys == ("one", "two", "three", "four", "five")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--port", "70000"], "port must be in [0, 65535], got 70000"),
        (["--port", "web"], "argument --port: invalid int value: 'web'"),
        (["model", "--model", "other"], "give either MODEL or --model, got both"),
        (["--api-key-file", "/no/such/file"], "cannot read --api-key-file"),
        (["--chat-template", "/no/such/file"], "cannot read --chat-template"),
        (["--no-such-option"], "--no-such-option"),
        (["--enable-auto-tool-choice"], "enable_auto_tool_choice needs tool_call_parser"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(served, capsys, arguments, text):
    try:
        code = run(*arguments)
    except SystemExit as exit:  # argparse's own
        code = exit.code
    assert code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert text in last
    assert not served


def test_empty_key_file_is_refused(served, capsys, tmp_path):
    file = tmp_path / "keys"
    file.write_text("\n")
    assert run("--api-key-file", str(file)) == 2
    assert "must hold at least one key" in capsys.readouterr().err


def test_missing_extra_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jpaged.serving.server", None)
    monkeypatch.delitem(sys.modules, "jpaged.serving.settings", raising=False)
    error = ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "jpaged.serving.server":
                raise error

    monkeypatch.delitem(sys.modules, "jpaged.serving.server")
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert run() == 2
    assert 'jpaged serve needs: pip install "jpaged[serve]"' in capsys.readouterr().err


def test_every_setting_has_a_flag_and_help_names_its_default():
    fields = {field.name: field.default for field in dataclasses.fields(ServerSettings)}
    found = {str(a.dest).removeprefix(SERVER_PREFIX): a for a in actions()}
    assert {NAMES_OF_FLAGS.get(name, name) for name in found} == fields.keys()
    for name, action in found.items():
        assert action.default is None, "what is left out is left to ServerSettings"
        shown = (action.help or "").rpartition("(default: ")[2].removesuffix(")")
        default: Any = fields[NAMES_OF_FLAGS.get(name, name)]
        if shown == action.help or isinstance(default, tuple | None):
            continue
        assert float(shown) == default if isinstance(default, float) else shown == str(default)
