"""`jpaged generate` of a file of prompts."""

import json

import pytest
from fake_llm import rows_of, run_file

from jpaged import cli
from jpaged.cli import engine


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
