"""`jpaged plan`, for GPUs, which need no compiler."""

import json

import pytest

from jpaged import cli


def test_a_table_and_a_command_line(capsys):
    assert cli.main(["plan", "-m", "llama-3-8b", "-t", "h200,t4", "-t", "h100"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()[3:6]]
    assert [(row[0], row[2]) for row in rows] == [("h200", "yes"), ("t4", "no"), ("h100", "yes")]
    assert "h200: jpaged serve --model llama-3-8b --max-model-len 8192" in out
    assert "t4: does not fit: needs" in out
    assert "Nothing was measured there." in out
    assert "3 targets in" in err


def test_options_reach_the_plan(capsys):
    options = ["--max-model-len", "4096", "--max-num-seqs", "64", "--max-num-batched-tokens", "512"]
    options += ["--block-size", "32", "--memory-utilization", "0.5", "--dtype", "float16"]
    arguments = ["plan", "-m", "llama-3-8b", "-t", "h200", "--context-len", "2048", "--json"]
    assert cli.main([*arguments, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    [target] = found["targets"]
    assert found["context_len"] == 2048
    assert target["budget_bytes"] == int(target["memory_bytes"] * 0.5)
    assert target["command"] == (
        "jpaged serve --model llama-3-8b --dtype float16 --max-model-len 4096 --max-num-seqs 64 "
        "--max-num-batched-tokens 512 --block-size 32 --memory-utilization 0.5"
    )
    assert target["decode"]["num_tokens"] == 64
    assert target["num_blocks"] == 64 * 4096 // 32 + 1


def test_nothing_that_fits_is_exit_code_1(capsys):
    assert cli.main(["plan", "-m", "llama-3-70b", "-t", "t4,l4"]) == 1
    assert capsys.readouterr().out.count("does not fit") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "llama-3-8b", "-t", "v7"], "unknown target 'v7'; known ones: v5e-{1,4,8"),
        (["-m", "llama-3-8b", "-t", ""], "unknown target ''; known ones: v5e-{1,4,8"),
        (["-m", "tiny", "-t", "v6e:3x3"], "target 'v6e:3x3': the topology must be one of 1x1,"),
        (["-m", "nothing", "-t", "h200"], "unknown model 'nothing': must be a directory"),
        (["-m", "tiny", "-t", "h200", "--block-size", "5"], "block_size must be one of"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert cli.main(["plan", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"jpaged: error: {message}")
    assert err.count("\n") == 1


def test_a_directory_is_a_model(tmp_path, capsys):
    from jpaged.plan.shapes import SHAPES

    (tmp_path / "config.json").write_text(json.dumps(SHAPES["tiny"]))
    assert cli.main(["plan", "-m", str(tmp_path), "-t", "l4"]) == 0
    assert f"--model {tmp_path}" in capsys.readouterr().out
