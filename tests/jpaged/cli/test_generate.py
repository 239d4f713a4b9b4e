"""`jpaged generate` of one prompt; at the end with the real engine."""

import contextlib
import io
import json
import signal
import subprocess
import sys
from typing import Any

import pytest
from fake_llm import FakeTokenizer, press_ctrl_c, rows_of, run_file
from helpers import needs_default_model

from jpaged import StructuredOutputsParams, cli
from jpaged.cli import engine, streaming, watch
from jpaged.engine_config import EngineConfig
from jpaged.sampling_params import RequestOutputKind, SamplingParams


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
