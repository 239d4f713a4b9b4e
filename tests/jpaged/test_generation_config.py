import json
import shutil
from pathlib import Path

import pytest

from jpaged import LLM, SamplingParams
from jpaged.generation_config import read_default_sampling


def _write(directory, **fields):
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return directory


def test_what_samples_is_read(tmp_path):
    fields = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": None, "do_sample": True}
    _write(tmp_path, **fields, eos_token_id=[1, 2], max_new_tokens=5)
    expected = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert read_default_sampling(tmp_path) == expected
    (tmp_path / "config.json").write_text("{}")
    assert read_default_sampling(tmp_path / "config.json") == expected


def test_there_may_be_none(tmp_path):
    assert read_default_sampling(tmp_path) == {}
    (tmp_path / "model.gguf").touch()
    assert read_default_sampling(_write(tmp_path, top_k=3) / "model.gguf") == {}


@pytest.mark.parametrize("top_p", [1.5, "high", True])
def test_what_is_out_of_range_is_left_out_and_told(tmp_path, caplog, top_p):
    _write(tmp_path, top_p=top_p, temperature=0.5)
    assert read_default_sampling(tmp_path) == {"temperature": 0.5}
    (record,) = caplog.records
    assert "generation_config.json: top_p must be" in record.getMessage()


@pytest.mark.parametrize("which", ["auto", "none"])
def test_it_holds_where_no_parameters_are_given(tiny_options, tmp_path, which):
    shutil.copytree(Path(tiny_options["model"]), tmp_path / "model")
    model = _write(tmp_path / "model", top_k=1, temperature=0.9)
    options = tiny_options | {"model": str(model)}
    prompt = {"prompt_token_ids": [5, 6, 7]}
    with LLM(**options, generation_config=which) as llm:
        params = llm.get_default_sampling_params()
        if which == "none":
            assert params == SamplingParams()
            return
        assert params == SamplingParams(top_k=1, temperature=0.9)
        # The one likeliest token each time, whatever the seed.
        open_output, greedy_output = (
            llm.generate(prompt, given, use_tqdm=False)[0].outputs[0].token_ids
            for given in (None, SamplingParams(temperature=0))
        )
        assert open_output == greedy_output
