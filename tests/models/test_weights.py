"""Safetensors: shards, casts, tolerated extras, and one clear line for each thing that is wrong."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny_models import CASES, make_weights, write_checkpoint

from jpaged.models import load_model
from jpaged.models import weights as reading
from jpaged.models.causal_lm import CausalLM, path_keys
from jpaged.models.loader import load_config

RAW = CASES["llama_mqa_tied"]


def load(directory, dtype="float32", **options):
    return load_model(directory, dtype=dtype, **options)


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_weights_are_fused_and_stored_in_by_out(tmp_path):
    weights = make_weights(RAW)
    params = load(write_checkpoint(tmp_path, RAW)).params
    layer = params["layers"][1]
    prefix = "model.layers.1.self_attn."
    parts = [weights[f"{prefix}{name}_proj.weight"].T for name in "qkv"]
    np.testing.assert_array_equal(
        layer["self_attn"]["qkv_proj"]["kernel"], np.concatenate(parts, axis=1)
    )
    np.testing.assert_array_equal(
        params["embed_tokens"]["weight"], weights["model.embed_tokens.weight"]
    )
    assert "lm_head" not in params


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_part_of_a_parameter_is_read_alone(size, tmp_path):
    source = reading.SafetensorsSource(write_checkpoint(tmp_path, RAW))
    model = CausalLM(load_config(tmp_path), dtype="float32", tensor_parallel_size=size)
    rng, num_cut = np.random.default_rng(size), 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(model.abstract_params)[0]:
        pieces = reading._pieces(path_keys(path), model)
        whole = reading._read_param(source, pieces, leaf, tuple((0, n, n) for n in leaf.shape))
        for _ in range(4):
            bounds = [sorted(rng.choice(n + 1, 2, replace=False).tolist()) for n in leaf.shape]
            box = tuple((*cut, n) for cut, n in zip(bounds, leaf.shape, strict=True))
            part = reading._read_param(source, pieces, leaf, box)
            np.testing.assert_array_equal(part, whole[tuple(slice(*cut) for cut in bounds)])
            num_cut += part.size < whole.size
    assert num_cut > 20


def test_only_the_columns_that_are_wanted_are_read(tmp_path):
    name = "model.layers.0.mlp.down_proj.weight"
    source = reading.SafetensorsSource(write_checkpoint(tmp_path, RAW))
    chunks = list(source.rows(name, slice(3, 9), slice(8, 24)))
    assert [(start, chunk.shape) for start, chunk in chunks] == [(3, (6, 16))]
    np.testing.assert_array_equal(chunks[0][1], make_weights(RAW)[name][3:9, 8:24])


def test_shards_equal_one_file(tmp_path):
    one = load(write_checkpoint(tmp_path / "one", RAW))
    three = load(write_checkpoint(tmp_path / "three", RAW, num_shards=3))
    assert equal(one.params, three.params)


def test_files_without_an_index_are_all_read(tmp_path):
    write_checkpoint(tmp_path, RAW, num_shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert equal(load(tmp_path).params, load(write_checkpoint(tmp_path / "one", RAW)).params)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_weights_are_cast_while_read(stored, tmp_path):
    weights = {name: value.astype(stored) for name, value in make_weights(RAW).items()}
    params = load(write_checkpoint(tmp_path, RAW, weights), dtype="bfloat16").params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(
        params["embed_tokens"]["weight"],
        weights["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16),
    )


def test_known_extras_are_tolerated(tmp_path):
    weights = make_weights(RAW)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    load(write_checkpoint(tmp_path, RAW, weights))


def test_dummy_weights_need_only_a_config_and_repeat(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CASES["qwen3"]))
    first = load(tmp_path, load_format="dummy")
    again = load(tmp_path / "config.json", load_format="dummy", dtype="float32")
    assert equal(first.params, again.params)
    kernel = np.asarray(first.params["layers"][0]["mlp"]["down_proj"]["kernel"])
    assert 0.01 < kernel.std() < 0.03
    assert np.all(np.asarray(first.params["norm"]["weight"]) == 1)


def break_missing_tensor(weights):
    del weights["model.layers.2.mlp.up_proj.weight"]


def break_unexpected_tensor(weights):
    weights["model.layers.0.mlp.router.weight"] = np.ones((2, 2), np.float32)


def break_shape(weights):
    weights["model.layers.1.self_attn.k_proj.weight"] = np.ones((16, 63), np.float32)


def break_dtype(weights):
    weights["model.norm.weight"] = np.ones(64, np.int32)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (break_missing_tensor, r"tensor 'model.layers.2.mlp.up_proj.weight' is missing"),
        (break_unexpected_tensor, r"safetensors: tensor 'model.layers.0.mlp.router.weight' is un"),
        (break_shape, r"k_proj.weight' must have shape \(16, 64\), got \(16, 63\)"),
        (break_dtype, r"tensor 'model.norm.weight' must be one of BF16, F16, F32, F64, got I32"),
    ],
)
def test_wrong_tensors_are_named(damage, text, tmp_path):
    weights = make_weights(RAW)
    damage(weights)
    with pytest.raises(ValueError, match=text) as raised:
        load(write_checkpoint(tmp_path, RAW, weights))
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_untied_model_without_a_head_is_refused(tmp_path):
    raw = RAW | {"tie_word_embeddings": False}
    with pytest.raises(ValueError, match=r"tensor 'lm_head.weight' is missing"):
        load(write_checkpoint(tmp_path, raw, make_weights(RAW)))


@pytest.mark.parametrize("length", [0, 5, 4000, -1])
def test_truncated_file_is_named(length, tmp_path):
    write_checkpoint(tmp_path, RAW)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model.safetensors is not a readable safetensors file"):
        load(tmp_path)


def test_missing_shard_and_broken_index_are_named(tmp_path):
    write_checkpoint(tmp_path, RAW, num_shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index.json names 'model-00002-of.*', which is not ther"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json is not a readable index"):
        load(tmp_path)


def test_directory_without_weights_or_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config.json must be there"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    with pytest.raises(ValueError, match=r"must hold \*.safetensors files, got none"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"load_format must be 'dummy' for a bare config"):
        load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not readable JSON"):
        load(tmp_path)


def test_quantised_safetensors_are_refused(tmp_path):
    raw = RAW | {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(ValueError, match="quantization_config must be absent"):
        load(write_checkpoint(tmp_path, raw, make_weights(RAW)))


def test_end_tokens_of_the_generation_config_are_added(tmp_path):
    write_checkpoint(tmp_path, RAW)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert load(tmp_path).config.eos_token_ids == (2, 9)


def test_no_tensor_is_lost_by_chunked_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("jpaged.models.weights._CHUNK_BYTES", 1000)
    weights = make_weights(RAW)
    params = load(write_checkpoint(tmp_path, RAW, weights)).params
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        params["layers"][2]["mlp"]["down_proj"]["kernel"],
        stored["model.layers.2.mlp.down_proj.weight"].T,
    )
