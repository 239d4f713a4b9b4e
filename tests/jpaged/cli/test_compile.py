"""`jpaged compile`."""

import json

from tiny_models import CASES

from jpaged import cli


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
