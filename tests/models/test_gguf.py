"""GGUF: header, dequantisation, permuted rows, configs, and files that are broken."""

import struct

import gguf
import jax
import numpy as np
import pytest
from helpers import needs_default_model
from tiny_models import CASES, make_weights, write_checkpoint

from jpaged.models import load_model
from jpaged.models.gguf import GGUFFile, GGUFSource, read_config
from jpaged.models.sources import resolve_source

STEMS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name):
    for old, new in STEMS.items():
        name = name.replace(old, new)
    return name.replace("model.layers", "blk")


def interleave(rows, num_heads):
    """llama.cpp's converter's permutation of q and k."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, raw, arch, *, metadata=(), drop=(), extra=(), kinds=None):
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(1e4)
    writer.add_eos_token_id(2)
    for key, value in metadata:
        writer.add_key_value(key, value, _value_type(value))
    for name, value in (make_weights(raw) | dict(extra)).items():
        own = gguf_name(name)
        if own in drop:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = raw["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            value = interleave(value, heads)
        kind = (kinds or {}).get(own)
        if kind is None:
            writer.add_tensor(own, value)
        else:
            data = gguf.quants.quantize(value, kind)
            writer.add_tensor(own, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _value_type(value):
    kinds = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32"}
    return gguf.GGUFValueType[kinds[type(value)]]


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("llama_mqa_tied", "llama"),
        ("mistral_full", "llama"),
        ("llama_linear_bias", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
    ],
)
def test_gguf_and_safetensors_give_the_same_parameters(name, arch, tmp_path):
    raw = CASES[name]
    ours = load_model(write_gguf(tmp_path / "tiny.gguf", raw, arch), dtype="float32")
    theirs = load_model(write_checkpoint(tmp_path / "hf", raw), dtype="float32")
    assert equal(ours.params, theirs.params)
    for field in ("num_kv_heads", "head_dim", "qkv_bias", "qk_norm", "tie_word_embeddings"):
        assert getattr(ours.config, field) == getattr(theirs.config, field)
    assert ours.config.eos_token_ids == (2,)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_dequantised_chunks_equal_the_package(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("jpaged.models.gguf._CHUNK_BYTES", 512)
    quantization = gguf.GGMLQuantizationType[kind]
    kinds = {"token_embd.weight": quantization}
    path = write_gguf(tmp_path / "tiny.gguf", CASES["llama_mha"], "llama", kinds=kinds)
    rows = [chunk.astype(np.float32) for _, chunk in GGUFFile(path).rows("token_embd.weight")]
    assert len(rows) > 1
    table = make_weights(CASES["llama_mha"])["model.embed_tokens.weight"]
    expected = gguf.quants.dequantize(gguf.quants.quantize(table, quantization), quantization)
    np.testing.assert_array_equal(np.concatenate(rows), expected)


@pytest.mark.parametrize("part", ["q_proj", "o_proj"])
def test_rows_and_columns_are_read_alone(part, tmp_path):
    source = GGUFSource(GGUFFile(write_gguf(tmp_path / "t.gguf", CASES["llama_mha"], "llama")))
    name = f"model.layers.1.self_attn.{part}.weight"
    whole = np.concatenate([chunk for _, chunk in source.rows(name)])
    ((start, found),) = source.rows(name, slice(21, 40), slice(8, 24))
    np.testing.assert_array_equal(found[21 - start : 40 - start], whole[21:40, 8:24])
    assert len(found) < len(whole)


def test_header_equals_the_package_reader(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", CASES["qwen3"], "qwen3", metadata=[("a.b", True)])
    reader, file = gguf.GGUFReader(path), GGUFFile(path)
    fields = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == fields
    for tensor in reader.tensors:
        info = file.tensors[tensor.name]
        assert (info.shape, info.offset) == (tuple(tensor.shape[::-1]), tensor.data_offset)


def test_rope_tables_and_scalings_are_read(tmp_path):
    raw = CASES["llama_mha"]
    table = {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}
    config = read_config(
        GGUFFile(write_gguf(tmp_path / "a.gguf", raw, "llama", extra=table.items()))
    )
    assert config.rope_scaling is not None
    assert config.rope_scaling.factors[-1] == 8.0
    scaled = [("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 4.0)]
    file = GGUFFile(write_gguf(tmp_path / "b.gguf", raw, "llama", metadata=scaled))
    scaling = read_config(file).rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"arch": "gemma3"}, "GGUF architecture must be one of llama, qwen2, qwen3, got 'gemma3'"),
        ({"metadata": [("split.count", 3)]}, "split.count must be 1, got 3: merge with"),
        (
            {"metadata": [("llama.rope.dimension_count", 8)]},
            "dimension_count must be the head's 16",
        ),
        ({"metadata": [("llama.expert_count", 8)]}, r"llama.expert_count must be 0 \(dense\)"),
        ({"drop": ["token_embd.weight"]}, "tensor 'token_embd.weight' is missing"),
        ({"drop": ["blk.2.attn_k.weight"]}, "tensor 'blk.2.attn_k.weight' is missing"),
        ({"extra": [("blk.0.ffn_gate_inp.weight", np.ones((2, 32), "f"))]}, "is unexpected"),
        ({"raw": {"max_position_embeddings": 0}}, "llama.context_length must be an integer of at"),
    ],
)
def test_unfit_files_are_refused_by_name(options, text, tmp_path):
    options = {"arch": "llama"} | options
    raw = CASES["llama_mha"] | options.pop("raw", {})
    path = write_gguf(tmp_path / "tiny.gguf", raw, options.pop("arch"), **options)
    with pytest.raises(ValueError, match=text) as raised:
        load_model(path, dtype="float32")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unsupported_tensor_type_is_refused(tmp_path, monkeypatch):
    kinds = {"token_embd.weight": gguf.GGMLQuantizationType.Q8_0}
    path = write_gguf(tmp_path / "tiny.gguf", CASES["llama_mha"], "llama", kinds=kinds)
    monkeypatch.delattr(gguf.quants, "Q8_0")
    with pytest.raises(ValueError, match=r"'token_embd.weight' has unsupported type Q8_0"):
        load_model(path, dtype="float32")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    return write_gguf(path, CASES["llama_mha"], "llama").read_bytes()


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.001, 0.01, 0.5, 0.999])
def test_truncated_file_is_refused_by_name(share, good, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(good[: int(share * len(good))])
    with pytest.raises(ValueError, match=r"cut.gguf is not a readable GGUF file: .") as raised:
        GGUFFile(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("offset", "patch", "text"),
    [
        (0, b"GGML", "it does not begin with 'GGUF'"),
        (4, struct.pack("<I", 1), "version must be 2 or 3 in little-endian order, got 1"),
        (8, struct.pack("<Q", 1 << 60), "is not a readable GGUF file"),
        (16, struct.pack("<Q", 1 << 60), "is not a readable GGUF file"),
        (24, struct.pack("<Q", 1 << 60), "it is cut short inside a string"),
        (24 + 8 + len("general.architecture"), struct.pack("<I", 99), "unknown metadata type 99"),
    ],
)
def test_corrupt_header_is_refused(offset, patch, text, good, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(good[:offset] + patch + good[offset + len(patch) :])
    with pytest.raises(ValueError, match=text):
        GGUFFile(path)


def test_random_damage_of_the_header_never_escapes_as_another_error(good, tmp_path):
    random, path = np.random.RandomState(0), tmp_path / "bad.gguf"
    head = 2500  # metadata and tensor places
    for _ in range(200):
        damaged = bytearray(good)
        for place in random.randint(8, head, size=4):
            damaged[place] = random.randint(256)
        path.write_bytes(damaged)
        try:
            file = GGUFFile(path)
            GGUFSource(file).shapes()
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 (most damage is harmless)


def test_impossible_places_are_refused(tmp_path):
    def write(metadata=b"", *, num_keys=0, dim=32, kind=0):
        name = struct.pack("<Q", 1) + b"t"
        tensor = name + struct.pack("<IQIQ", 1, dim, kind, 0)
        head = b"GGUF" + struct.pack("<IQQ", 3, 1, num_keys)
        path = tmp_path / "odd.gguf"
        path.write_bytes(head + metadata + tensor + bytes(1024))
        return path

    assert GGUFFile(write()).tensors["t"].shape == (32,)
    with pytest.raises(ValueError, match=r"tensor 't' of type Q8_0 has shape \(33,\)"):
        GGUFFile(write(dim=33, kind=8))
    with pytest.raises(ValueError, match=r"it is cut short: tensor 't' ends at byte"):
        GGUFFile(write(dim=4096))
    key = struct.pack("<Q", len("general.alignment")) + b"general.alignment"
    with pytest.raises(ValueError, match=r"general.alignment must be at least 1, got 0"):
        GGUFFile(write(key + struct.pack("<II", 4, 0), num_keys=1))
    with pytest.raises(ValueError, match=r"unknown metadata array type 9 at byte"):
        GGUFFile(write(key + struct.pack("<IIQ", 9, 9, 1), num_keys=1))


@needs_default_model
@pytest.mark.model
def test_default_model_is_what_it_says():
    config = read_config(GGUFFile(resolve_source(None)))
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2,)
