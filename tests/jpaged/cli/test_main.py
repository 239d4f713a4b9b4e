"""What all commands share: help, errors, exit codes."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jpaged
from jpaged import cli
from jpaged.cli import engine
from jpaged.cli.parser import build_parser
from jpaged.engine_config import EngineConfig
from jpaged.sampling_params import SamplingParams

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("command", ["generate", "chat", "compile", "doctor", "plan"])
def test_help_names_every_option_and_its_default(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith(f"usage: jpaged {command} [options]")
    if command != "doctor":
        assert "(default: 16)" in text


def test_no_command_prints_the_help(capsys):
    assert cli.main([]) == 0
    assert "commands:" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"jpaged {jpaged.__version__}\n"


def test_help_imports_no_jax():
    code = (
        "import sys\nfrom jpaged.cli import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'jax', 'numpy', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("kind", [SamplingParams, EngineConfig])
@pytest.mark.parametrize("command", ["generate", "chat", "compile"])
def test_options_are_fields_and_help_names_their_defaults(command, kind):
    prefix = "sampling_" if kind is SamplingParams else "engine_"
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    choices: Any = next(a for a in build_parser()._actions if a.dest == "command").choices
    actions = [a for a in choices[command]._actions if a.dest.startswith(prefix)]
    for action in actions:
        name = action.dest.removeprefix(prefix)
        assert name in defaults
        assert action.default is None
        shown = (action.help or "").rpartition("(default: ")[2].removesuffix(")")
        own = name == "max_tokens" or (command == "chat" and name == "temperature")
        if shown != action.help and not own and defaults[name] is not None:
            assert shown.startswith(("lazy in", str(defaults[name]))), action.option_strings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hi", "--temperature", "-1"], "temperature must be a finite number >= 0"),
        (["generate", "hi", "--top-p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        (["generate", "hi", "--n", "0"], "n must be at least 1, got 0"),
        (["generate", "hi", "--beam-width", "4"], "best_of needs use_beam_search=True, got 4"),
        (
            ["generate", "hi", "--use-beam-search", "--beam-width", "2", "--n", "3"],
            "n must be at most best_of=2 (the beam width), got 3",
        ),
        (
            ["generate", "hi", "--use-beam-search", "--temperature", "1"],
            "temperature must be 0 with use_beam_search=True, got 1.0",
        ),
        (["generate", "hi", "--max-tokens", "-3"], "max_tokens must be at least 1"),
        (["generate", "hi", "--logprobs", "2"], "--logprobs needs -o FILE"),
        (["generate", "hi", "--watch"], "--watch draws on standard error, which must be a"),
        (["generate", "hi", "--raw", "--system", "s"], "--system needs a chat template, and --raw"),
        (["generate", "hi", "--prompts-file", "x"], "give either PROMPT or --prompts-file"),
        (["generate", "--prompts-file", "/missing"], "No such file or directory: '/missing'"),
        (["generate", ""], "prompt must not be empty"),
        (["generate", "hi", "-o", "/missing/x"], "cannot write --output /missing/x"),
        (["generate", "too long", "--raw"], "prompt must be at most 8 tokens, got 9"),
        (["chat", "--min-p", "2"], "min_p must be in [0, 1], got 2.0"),
    ],
)
def test_mistake_is_one_line_on_stderr(arguments, message, llms, stdin, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jpaged: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_bad_engine_option_is_one_line(capsys):
    assert cli.main(["generate", "hi", "--block-size", "5"]) == 2
    assert "jpaged: error: block_size must be one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hi", "--stop-token-ids", "1,x"], "must be integers separated by commas"),
        (["generate", "hi", "--kv-cache-memory-bytes", "2 bananas"], "must be like 2GiB"),
        (["generate", "hi", "--temp", "0"], "unrecognized arguments"),
        (["generate", "hi", "--early-stopping", "no"], "must be True, False or never, got 'no'"),
        (["generate", "hi", "--json-schema", "/missing"], "cannot read /missing: No such file"),
        (["generate", "hi", "--json-schema", "{"], "json must be a JSON schema"),
        (["generate", "hi", "--grammar", "/missing"], "cannot read /missing: No such file"),
        (["generate", "hi", "--regex", ""], "regex must not be empty"),
        (["generate", "hi", "--choice", ""], "choice must not be empty"),
        (["generate", "hi", "--choice", "a", "--regex", "b"], "not allowed with argument"),
    ],
)
def test_unusable_argument_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_debug_shows_the_traceback(llms):
    with pytest.raises(ValueError, match="top_p"):
        cli.main(["generate", "hi", "--top-p", "2", "--debug"])


def test_long_error_is_cut_to_its_first_line(monkeypatch, capsys):
    def make_llm(options):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmany\nlines")

    monkeypatch.setattr(engine, "make_llm", make_llm)
    assert cli.main(["generate", "hi"]) == 2
    assert capsys.readouterr().err == (
        "jpaged: error: RESOURCE_EXHAUSTED: out of memory (--debug shows the rest)\n"
    )


def test_reader_that_leaves_is_no_error(monkeypatch, llms):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["generate", "Who?"]) == 1
        with contextlib.suppress(OSError):
            pipe.flush()
