"""The command line, with a fake engine; at the end once with the real one."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from helpers import needs_default_model
from tiny_models import CASES

import jpaged
from jpaged import StructuredOutputsParams, cli, doctor
from jpaged.cli import engine, streaming, watch
from jpaged.cli.parser import build_parser
from jpaged.compile_plan import ProgramState, StepProgram, StepShape
from jpaged.engine_config import EngineConfig
from jpaged.outputs import CompletionOutput, Logprob, RequestOutput
from jpaged.sampling_params import RequestOutputKind, SamplingParams

ROOT = Path(__file__).parents[2]


class FakeTokenizer:
    chat_template: str | None = "{{ messages }}"


class FakeLLM:
    """Answers every prompt with the same pieces, and keeps what it was asked."""

    pieces = ("Hello", " wörld", "!")

    def __init__(self, options):
        self.options = options
        self.requests = []
        self.num_streams_closed_early = 0
        self.is_shut_down = False
        self.tokenizer = FakeTokenizer()
        self.on_piece = lambda: None
        shapes = [StepShape(1, 1, True), StepShape(128, 8, False)]
        self.compile_plan = types.SimpleNamespace(
            programs=[StepProgram(s.name, str, shape=s) for s in shapes]
        )
        if options.get("compilation") == "eager":
            for program in self.compile_plan.programs:
                program.state, program.compile_time_s = ProgramState.READY, 1.5

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.is_shut_down = True

    def get_tokenizer(self):
        return self.tokenizer

    def chat_prompt(self, messages):
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return {"prompt": text, "prompt_token_ids": list(text.encode())}

    def validate_request(self, prompt, params):
        if "too long" in str(prompt.get("prompt")):
            raise ValueError("prompt must be at most 8 tokens, got 9")

    def stream(self, prompt, params):
        kind = RequestOutputKind.FINAL_ONLY if params.use_beam_search else RequestOutputKind.DELTA
        assert params.output_kind is kind
        self.requests.append((prompt, params))
        finished = False
        try:
            for i, piece in enumerate(self.pieces):
                finished = i == len(self.pieces) - 1
                parts = [
                    CompletionOutput(j, piece, [i], finish_reason="stop" if finished else None)
                    for j in range(params.n)
                ]
                yield RequestOutput("0", None, [1, 2, 3], parts, finished)
                self.on_piece()
        finally:
            self.num_streams_closed_early += not finished

    def generate(self, prompts, sampling_params, *, use_tqdm, priority):
        self.requests += zip(prompts, sampling_params, strict=True)
        self.priority = priority
        text = "".join(self.pieces)
        logprobs = [{7: Logprob(-0.5, 1, "x")}]
        return [
            RequestOutput(
                str(i),
                None,
                [1, 2, 3],
                [
                    CompletionOutput(j, text, [7, 8], None, logprobs, "length")
                    for j in range(params.n)
                ],
                True,
            )
            for i, params in enumerate(sampling_params)
        ]


@pytest.fixture
def llms(monkeypatch) -> list[FakeLLM]:
    """Puts fake engines in place; the list holds those that were made."""
    made = []

    def make_llm(options):
        made.append(FakeLLM(options))
        return made[-1]

    monkeypatch.setattr(engine, "make_llm", make_llm)
    return made


@pytest.fixture
def stdin(monkeypatch):
    def give(text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    give("")
    return give


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# Help, errors.


@pytest.mark.parametrize("command", ["generate", "chat", "compile", "doctor"])
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


# One prompt.


def test_single_prompt_streams_text_and_statistics_apart(llms, capsys):
    assert cli.main(["generate", "Who?", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello wörld!\n"
    assert "3 prompt tokens, first token after" in captured.err
    assert "3 tokens at" in captured.err
    assert captured.err.endswith("ended by stop\n")
    (llm,) = llms
    ((prompt, params),) = llm.requests
    assert prompt["prompt"] == "<user>Who?"
    assert (params.temperature, params.max_tokens) == (0.0, 256)
    assert llm.options == {"compilation": "lazy"}
    assert llm.is_shut_down


def test_each_piece_is_flushed(llms, monkeypatch):
    written = []

    class Terminal(io.StringIO):
        def flush(self):
            written.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    cli.main(["generate", "Who?", "-q"])
    assert written[:3] == ["Hello", "Hello wörld", "Hello wörld!"]


def test_quiet_prints_no_statistics(llms, capsys):
    cli.main(["generate", "Who?", "--quiet"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("n", [1, 2])
def test_watching_shows_the_text_at_the_end(n, llms, monkeypatch, capsys):
    watched = []

    @contextlib.contextmanager
    def watching(llm):
        watched.append(llm)
        yield
        assert capsys.readouterr().out == ""

    monkeypatch.setattr(watch, "watching", watching)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main(["generate", "hi", "--watch", "--n", str(n)]) == 0
    assert watched == llms
    out = capsys.readouterr().out
    assert out.count("Hello wörld!") == n


def test_watching_a_file_of_prompts(llms, tmp_path, monkeypatch):
    watched = []
    monkeypatch.setattr(watch, "watching", lambda llm: contextlib.nullcontext(watched.append(llm)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, rows = run_file(tmp_path, "in.txt", "a\nb\n", "--watch")
    assert (code, len(rows)) == (0, 2)
    assert watched == llms


def test_raw_prompt_goes_without_template(llms):
    cli.main(["generate", "Once", "--raw"])
    assert llms[0].requests[0][0] == {"prompt": "Once"}


def test_prompt_of_a_model_without_template_is_raw(llms, monkeypatch):
    monkeypatch.setattr(FakeTokenizer, "chat_template", None)
    assert cli.main(["generate", "Once"]) == 0
    assert llms[0].requests[0][0] == {"prompt": "Once"}
    assert cli.main(["generate", "Once", "--system", "s"]) == 2


def test_system_message_comes_first(llms):
    cli.main(["generate", "Who?", "--system", "Be brief."])
    assert llms[0].requests[0][0]["prompt"] == "<system>Be brief.<user>Who?"


def test_piped_prompt_is_read(llms, stdin):
    stdin("two\nlines\n")
    cli.main(["generate"])
    assert llms[0].requests[0][0]["prompt"] == "<user>two\nlines"


def test_several_continuations_are_shown_one_after_another(llms, capsys):
    assert cli.main(["generate", "Who?", "--n", "2", "-q"]) == 0
    assert capsys.readouterr().out == "--- 1 of 2\nHello wörld!\n--- 2 of 2\nHello wörld!\n"


@pytest.mark.parametrize(
    ("text", "early_stopping"), [("True", True), ("false", False), ("never", "never")]
)
def test_beam_search_flags_arrive(text, early_stopping, llms):
    flags = f"--use-beam-search --beam-width 4 --length-penalty 0.5 --early-stopping {text}"
    assert cli.main(["generate", "Who?", *flags.split()]) == 0
    assert llms[0].requests[0][1] == SamplingParams(
        use_beam_search=True,
        best_of=4,
        length_penalty=0.5,
        early_stopping=early_stopping,
        temperature=0,
        max_tokens=256,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (["--json-schema", ' {"type": "null"}'], {"json": {"type": "null"}}),
        (["--json-schema", "FILE"], {"json": {"type": "array"}}),
        (["--regex", "a+"], {"regex": "a+"}),
        (["--choice", "red", "--choice", "blue"], {"choice": ["red", "blue"]}),
        (["--grammar", "FILE"], {"grammar": '{"type": "array"}'}),
    ],
)
def test_form_of_the_output_arrives(arguments, fields, llms, tmp_path):
    (tmp_path / "file").write_text('{"type": "array"}')
    arguments = [str(tmp_path / "file") if a == "FILE" else a for a in arguments]
    assert cli.main(["generate", "Who?", *arguments]) == 0
    assert llms[0].requests[0][1].structured_outputs == StructuredOutputsParams(**fields)


def test_prompts_of_a_file_have_forms_of_their_own(llms, tmp_path):
    rows = [
        {"prompt": "a", "structured_outputs": {"regex": "x"}},
        {"prompt": "b"},
        {"prompt": "c", "structured_outputs": None},
        {"prompt": "d", "structured_outputs": {"regexp": "x"}},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    flags = ["--prompts-file", str(tmp_path / "in.jsonl"), "-o", str(output), "--choice", "red"]
    assert cli.main(["generate", *flags]) == 1
    found = [params.structured_outputs for _, params in llms[0].requests]
    assert found[-3:] == [
        StructuredOutputsParams(regex="x"),
        StructuredOutputsParams(choice=["red"]),
        None,
    ]
    last = json.loads(output.read_text().splitlines()[3])
    assert "structured_outputs must have fields among" in last["error"]


def test_every_sampling_flag_arrives(llms):
    flags = (
        "--max-tokens 9 --min-tokens 2 --temperature 0.5 --top-p 0.9 --top-k 40 --min-p 0.05 "
        "--seed 7 --n 2 --presence-penalty 0.1 --frequency-penalty 0.2 --repetition-penalty 1.1 "
        "--stop a --stop b --stop-token-ids 3,4 --bad-words x --bad-words y --ignore-eos"
    )
    cli.main(["generate", "Who?", *flags.split()])
    assert llms[0].requests[0][1] == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=7,
        n=2,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        stop=["a", "b"],
        stop_token_ids=[3, 4],
        bad_words=["x", "y"],
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )


def test_every_engine_flag_arrives(llms):
    flags = (
        "--model m --tokenizer t --revision r --load-format dummy --dtype float32 "
        "--max-model-len 128 --max-num-seqs 4 --max-num-batched-tokens 64 --block-size 32 "
        "--kv-cache-memory-bytes 2GiB --memory-utilization 0.5 --no-prefix-caching "
        "--policy priority --max-logprobs 5 --engine-seed 3 --compilation eager"
    )
    cli.main(["generate", "Who?", *flags.split()])
    config = EngineConfig.from_options(**llms[0].options)
    assert config == EngineConfig(
        model="m",
        tokenizer="t",
        revision="r",
        load_format="dummy",
        dtype="float32",
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        block_size=32,
        kv_cache_memory_bytes=2 << 30,
        memory_utilization=0.5,
        enable_prefix_caching=False,
        policy="priority",
        max_logprobs=5,
        seed=3,
        compilation="eager",
    )
    cli.main(["generate", "Who?", "--num-blocks", "99"])
    assert llms[1].options["num_blocks"] == 99


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000", 1000),
        ("1k", 1000),
        ("512MiB", 512 << 20),
        ("1.5g", 1_500_000_000),
        ("2Gi", 2 << 30),
    ],
)
def test_sizes_have_units(text, expected, llms):
    cli.main(["generate", "Who?", "--kv-cache-memory-bytes", text])
    assert llms[0].options["kv_cache_memory_bytes"] == expected


@pytest.fixture
def sigint():
    """Ctrl-C as a terminal has it; what starts a process in the background may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_aborts_and_exits_with_130(llms, monkeypatch, capsys):
    make: Any = engine.make_llm

    def make_llm(options):
        llm = make(options)
        llm.on_piece = press_ctrl_c
        return llm

    monkeypatch.setattr(engine, "make_llm", make_llm)
    assert cli.main(["generate", "Who?"]) == 130
    captured = capsys.readouterr()
    assert captured.out.startswith("Hello")
    assert "!" not in captured.out
    assert "ended by interrupted" in captured.err
    assert llms[0].num_streams_closed_early == 1
    assert llms[0].is_shut_down
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("sigint")
def test_second_ctrl_c_interrupts_at_once():
    with streaming.ctrl_c_interrupts() as interrupted:
        press_ctrl_c()
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_text_the_terminal_cannot_show_is_replaced(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    streaming.write_text("wörld")
    assert buffer.getvalue() == b"w?rld"


# Files of prompts.


def run_file(tmp_path, name, content, *flags) -> tuple[int, list[dict]]:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    output = tmp_path / "out.jsonl"
    code = cli.main(["generate", "--prompts-file", str(file), "-o", str(output), *flags])
    return code, rows_of(output.read_text(encoding="utf-8"))


def test_text_file_is_one_prompt_a_line(llms, tmp_path, capsys):
    code, rows = run_file(tmp_path, "p.txt", "one\n\n{two}\r\n", "--raw")
    assert code == 0
    assert [prompt for prompt, _ in llms[0].requests] == [{"prompt": "one"}, {"prompt": "{two}"}]
    assert rows == [
        {
            "index": i,
            "prompt": prompt,
            "outputs": [
                {
                    "text": "Hello wörld!",
                    "token_ids": [7, 8],
                    "finish_reason": "length",
                    "stop_reason": None,
                }
            ],
            "num_prompt_tokens": 3,
            "num_cached_tokens": 0,
        }
        for i, prompt in enumerate(["one", "{two}"])
    ]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jpaged: 2 prompts, 6 prompt tokens, 4 tokens in ")


def test_json_lines_take_every_form_of_prompt_and_override_sampling(llms, tmp_path):
    lines = [
        {"prompt": "a", "temperature": 0, "max_tokens": 3, "id": "x"},
        {"messages": [{"role": "user", "content": "b"}], "n": 2},
        {"prompt_token_ids": [5, 6], "cache_salt": "s", "logit_bias": {"5": 1.5}},
    ]
    content = "\n".join(map(json.dumps, lines))
    code, rows = run_file(tmp_path, "p.jsonl", content, "--max-tokens", "7", "--system", "S")
    assert code == 0
    prompts, params = zip(*llms[0].requests, strict=True)
    assert prompts[0]["prompt"] == "<system>S<user>a"
    assert prompts[1]["prompt"] == "<system>S<user>b"
    assert prompts[2] == {"prompt_token_ids": [5, 6], "cache_salt": "s"}
    assert [p.max_tokens for p in params] == [3, 7, 7]
    assert [p.temperature for p in params] == [0, 1, 1]
    assert params[2].logit_bias == {5: 1.5}
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [len(row["outputs"]) for row in rows] == [1, 2, 1]
    assert rows[0]["id"] == "x"
    assert rows[2]["prompt_token_ids"] == [5, 6]


BAD_LINES = [
    (b"{", "the line is not JSON"),
    (b"[1]", "the line must hold a JSON object, got '[1]'"),
    (b'{"prompt": "\xff"}', "the line is not UTF-8"),
    (b"{}", "one of prompt, messages, prompt_token_ids must be given, got none"),
    (b'{"prompt": "a", "messages": []}', "must be given, got prompt, messages"),
    (b'{"prompt": ""}', "prompt must be a non-empty string, got ''"),
    (b'{"prompt": 5}', "prompt must be a non-empty string, got 5"),
    (b'{"messages": []}', "messages must be a non-empty list"),
    (b'{"prompt_token_ids": [1, "x"]}', "prompt_token_ids must be a non-empty list of integers"),
    (b'{"prompt": "a", "temperatur": 0}', "unknown field 'temperatur'; sampling fields: "),
    (b'{"prompt": "a", "output_kind": "delta"}', "unknown field 'output_kind'"),
    (b'{"prompt": "a", "temperature": "hot"}', "temperature must be a number"),
    (b'{"prompt": "a", "top_p": 0}', "top_p must be in (0, 1], got 0"),
    (b'{"prompt": "a", "priority": 1}', "priority needs --policy priority, got 1"),
    (b'{"prompt": "a", "priority": "high"}', "priority must be an integer, got 'high'"),
    (b'{"prompt": "a", "stop": [["b"]]}', "stop must hold strings only, got ['b']"),
    (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias must have integers >= 0 as token ids"),
    (b'{"prompt": "a", "id": "\\ud800"}', "the line is not Unicode text"),
    (b'{"prompt": "too long"}', "prompt must be at most 8 tokens, got 9"),
]


def test_bad_lines_cost_only_themselves(llms, tmp_path, capsys):
    good = b'{"prompt": "fine"}'
    content = b"\n".join([good, *(line for line, _ in BAD_LINES), good])
    code, rows = run_file(tmp_path, "p.jsonl", content)
    assert code == 1
    assert len(llms[0].requests) == 2
    assert "outputs" in rows[0]
    assert "outputs" in rows[-1]
    for row, (line, message) in zip(rows[1:-1], BAD_LINES, strict=True):
        assert row.keys() <= {"index", "error"}, line
        assert message in row["error"]
        assert "\n" not in row["error"]
    assert f"{len(BAD_LINES) + 2} prompts, {len(BAD_LINES)} failed" in capsys.readouterr().err


def test_no_engine_is_made_for_no_usable_line(llms, tmp_path, capsys):
    code, rows = run_file(tmp_path, "p.jsonl", "{", "--quiet")
    assert (code, len(rows), llms) == (1, 1, [])
    assert capsys.readouterr().err.startswith("jpaged: 1 prompts, 1 failed")


def test_failing_engine_keeps_an_earlier_output_file(monkeypatch, tmp_path):
    def make_llm(options):
        raise RuntimeError("no such model")

    monkeypatch.setattr(engine, "make_llm", make_llm)
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    assert cli.main(["generate", "hi", "-o", str(output)]) == 2
    assert output.read_text() == "old"


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ('\ufeff{"prompt": "one"}\n{"prompt": "two"}', ["one", "two"]),
    ],
)
def test_file_from_standard_input_goes_to_standard_output(text, prompts, llms, stdin, capsys):
    stdin(text)
    assert cli.main(["generate", "--prompts-file", "-", "--raw", "-q"]) == 0
    captured = capsys.readouterr()
    assert [row["prompt"] for row in rows_of(captured.out)] == prompts
    assert captured.err == ""


def test_empty_file_is_refused(llms, stdin, capsys):
    stdin("\n \n")
    assert cli.main(["generate", "--prompts-file", "-"]) == 2
    assert "--prompts-file must hold at least one prompt" in capsys.readouterr().err


def test_logprobs_are_written(llms, tmp_path):
    _, rows = run_file(tmp_path, "p.txt", "one", "--logprobs", "1")
    expected = [{"7": {"logprob": -0.5, "rank": 1, "decoded_token": "x"}}]
    assert rows[0]["outputs"][0]["logprobs"] == expected


def test_priorities_arrive(llms, tmp_path):
    content = '{"prompt": "a"}\n{"prompt": "b", "priority": -1}'
    code, _ = run_file(tmp_path, "p.jsonl", content, "--policy", "priority")
    assert (code, llms[0].priority) == (0, [0, -1])
    run_file(tmp_path, "p.jsonl", "{}\n" + content.splitlines()[0])
    assert llms[1].priority is None


# Chat.


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


# The other commands.


def test_compile_list_is_a_table(llms, capsys):
    assert cli.main(["compile", "--list", "--max-num-seqs", "8"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "program      kind    tokens  sequences  state",
        "decode_1     decode       1          1  pending",
        "mixed_128x8  mixed      128          8  pending",
    ]
    assert "2 programs listed" in captured.err
    assert llms[0].options == {
        "max_num_seqs": 8,
        "compilation": "lazy",
        "skip_tokenizer_init": True,
    }


def test_compile_lists_the_programs_of_a_bare_config(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CASES["llama_mha"]))
    assert cli.main(["compile", "--list", "-m", str(config), "--load-format", "dummy"]) == 0
    assert "decode_1" in capsys.readouterr().out


def test_compile_compiles_everything_and_prints_times(llms, capsys):
    assert cli.main(["compile"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1] == "decode_1     decode       1          1  ready     1.50"
    assert "2 programs compiled in" in captured.err
    assert llms[0].options["compilation"] == "eager"


def test_doctor_reports_this_machine(capsys):
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["problems"]) == (0, [])
    assert report["versions"]["jpaged"] == jpaged.__version__
    assert report["devices"]
    assert report["choices"].keys() == {"device", "dtype", "kernels", "block pool", "budgets"}
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("versions", "devices", "default model", "compilation cache", "would be used"):
        assert word in text


def test_doctor_hints_at_the_missing_cuda_plugin(monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia_gpus", lambda: ["NVIDIA H100, 9.0, 81559 MiB"])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    report = {"hints": [], "backend": "cpu", "compilation_cache": None}
    report["nvidia_driver"] = doctor._nvidia_gpus()
    doctor._add_hints(report)
    assert 'JAX has no CUDA plugin: pip install "jpaged[cuda]"' in report["hints"][0]


def test_doctor_survives_a_broken_jax(monkeypatch, capsys):
    def broken(report):
        raise RuntimeError("Unable to initialize backend\nlong story")

    monkeypatch.setattr(doctor, "_examine_jax", broken)
    assert cli.main(["doctor"]) == 1
    assert "- JAX cannot start: Unable to initialize backend\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (2048, "2.0 KiB"), (3 << 29, "1.5 GiB")]
)
def test_sizes_are_readable(num_bytes, text):
    assert doctor._size(num_bytes) == text


def test_reader_that_leaves_is_no_error(monkeypatch, llms):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["generate", "Who?"]) == 1
        with contextlib.suppress(OSError):
            pipe.flush()


# The real engine, in a process of its own.


@pytest.mark.model
@needs_default_model
def test_default_model_answers(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "The capital of France is"}\n'
        '{"prompt": "x", "top_p": 7}\n'
        '{"prompt": "One, two, three,", "max_tokens": 4}\n'
    )
    command = [sys.executable, "-m", "jpaged", "generate", "--raw", "--temperature", "0"]
    small = ["--max-num-seqs", "1", "--max-num-batched-tokens", "16", "--compilation", "lazy"]
    one = subprocess.run(
        [*command, *small, "The capital of France is", "--max-tokens", "8"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert one.returncode == 0, one.stderr
    assert "Paris" in one.stdout
    assert "8 tokens" in one.stderr
    assert "Traceback" not in one.stderr
    many = subprocess.run(
        [*command, *small, "--prompts-file", str(prompts), "--max-tokens", "8"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert many.returncode == 1, many.stderr
    rows = rows_of(many.stdout)
    assert rows[0]["outputs"][0]["text"] == one.stdout.removesuffix("\n")
    assert rows[1] == {"index": 1, "error": "top_p must be in (0, 1], got 7"}
    assert len(rows[2]["outputs"][0]["token_ids"]) == 4
    assert rows[2]["outputs"][0]["finish_reason"] == "length"
