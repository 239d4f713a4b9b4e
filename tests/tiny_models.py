"""Tiny models of every architecture, the same on every machine: configs, weights, paged runs."""

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import PartitionSpec as P

from jpaged.models import AttentionMetadata, CausalLM, Params
from jpaged.models.sharding import pool_spec

_BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _case(architecture: str, **fields: Any) -> dict[str, Any]:
    kind = architecture.removesuffix("ForCausalLM").lower()
    return _BASE | {"architectures": [architecture], "model_type": kind} | fields


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

# Rotary parameters occur in both spellings: rope_theta with rope_scaling, and rope_parameters.
CASES: dict[str, dict[str, Any]] = {
    "llama_mha": _case("LlamaForCausalLM", rope_theta=10000.0),
    "llama_mqa_tied": _case(
        "LlamaForCausalLM", num_key_value_heads=1, tie_word_embeddings=True, rope_theta=10000.0
    ),
    "llama_gqa_llama3": _case(
        "LlamaForCausalLM", num_key_value_heads=2, rope_theta=500.0, rope_scaling=_LLAMA3
    ),
    "llama_linear_bias": _case(
        "LlamaForCausalLM",
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
    ),
    "llama_yarn": _case("LlamaForCausalLM", rope_parameters=_YARN | {"rope_theta": 10000.0}),
    "mistral_window": _case(
        "MistralForCausalLM", num_key_value_heads=2, head_dim=32, sliding_window=9, rope_theta=1e4
    ),
    "mistral_full": _case(
        "MistralForCausalLM", num_key_value_heads=2, sliding_window=None, rope_theta=1e6
    ),
    "qwen2": _case("Qwen2ForCausalLM", num_key_value_heads=2, rope_theta=1e6),
    "qwen2_window_tied": _case(
        "Qwen2ForCausalLM",
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
        rope_theta=1e4,
    ),
    "qwen3": _case(
        "Qwen3ForCausalLM",
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}
PROMPT = np.random.RandomState(7).randint(3, 96, size=41).tolist()


def make_weights(raw: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns f32 weights by Hugging Face name; each depends on its name and shape alone."""
    size, width, heads = raw["hidden_size"], raw["intermediate_size"], raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or size // heads
    q_size, kv_size = heads * head_dim, raw["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (raw["vocab_size"], size), "model.norm.weight": (size,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (raw["vocab_size"], size)
    is_qwen2 = raw["model_type"] == "qwen2"
    qkv_bias = raw.get("attention_bias", False) or is_qwen2
    o_bias, mlp_bias = raw.get("attention_bias", False), raw.get("mlp_bias", False)
    linears = {
        "self_attn.q_proj": (q_size, size, qkv_bias),
        "self_attn.k_proj": (kv_size, size, qkv_bias),
        "self_attn.v_proj": (kv_size, size, qkv_bias),
        "self_attn.o_proj": (size, q_size, o_bias),
        "mlp.gate_proj": (width, size, mlp_bias),
        "mlp.up_proj": (width, size, mlp_bias),
        "mlp.down_proj": (size, width, mlp_bias),
    }
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, (size_out, size_in, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (size_out, size_in)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (size_out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (size,)
        if raw["model_type"] == "qwen3":
            shapes[f"{prefix}self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (head_dim,)
    return {name: _draw(name, shape) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    # RandomState's streams are frozen by NumPy's policy; default_rng's are not.
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name:
        values = 1.0 + 0.1 * values
    elif "embed" in name:
        pass
    elif len(shape) == 2:
        values = values * 1.5 / np.sqrt(shape[1])
    return values.astype(np.float32)


def write_checkpoint(
    directory: Path,
    raw: dict[str, Any],
    weights: dict[str, np.ndarray] | None = None,
    *,
    num_shards: int = 1,
) -> Path:
    """Writes config.json and safetensors (with an index when there are several shards)."""
    weights = make_weights(raw) if weights is None else weights
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    if num_shards == 1:
        safetensors.numpy.save_file(weights, directory / "model.safetensors")
        return directory
    names, where = sorted(weights), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        own = {name: weights[name] for name in names[shard::num_shards]}
        safetensors.numpy.save_file(own, directory / file)
        where |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def paged_logits(
    model: CausalLM,
    params: Params,
    token_ids: list[int],
    *,
    block_size: int = 8,
    chunk: int | None = None,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
    """Returns f32 logits at every position of one sequence, run through a scattered block pool."""
    config, length = model.config, len(token_ids)
    chunk = chunk or length
    num_blocks = -(-length // block_size)
    blocks = 1 + np.random.RandomState(0).permutation(num_blocks)
    num_heads = model.local_config.num_kv_heads * model.tensor_parallel_size
    shape = (num_blocks + 1, 2, num_heads, block_size, config.head_dim)
    pools = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    step = _jitted_step(model, mesh)
    rows = []
    for start in range(0, length, chunk):
        positions = np.arange(start, min(start + chunk, length), dtype=np.int32)
        metadata = AttentionMetadata(
            slot_mapping=jnp.asarray(
                blocks[positions // block_size] * block_size + positions % block_size, jnp.int32
            ),
            block_tables=jnp.asarray(blocks[None], jnp.int32),
            seq_lens=jnp.asarray([start + len(positions)], jnp.int32),
            query_start_loc=jnp.asarray([0, len(positions)], jnp.int32),
        )
        ids = jnp.asarray(token_ids[start : start + chunk], jnp.int32)
        logits, pools = step(params, ids, jnp.asarray(positions), pools, metadata)
        rows.append(np.asarray(logits))
    return np.concatenate(rows)


@functools.cache
def _jitted_step(model: CausalLM, mesh: jax.sharding.Mesh | None):
    def step(params, ids, positions, pools, metadata):
        hidden, pools = model.hidden_states(params, ids, positions, pools, metadata)
        return model.logits(params, hidden), pools

    if mesh is not None:
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(model.param_specs, P(), P(), pool_spec(), P()),
            out_specs=(P(), pool_spec()),
            check_vma=False,
        )
    return jax.jit(step)
