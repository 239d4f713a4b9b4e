"""The Llama decoder (Llama 2 and 3, SmolLM), which the other families specialise.

A layer is traced and lowered once a step shape, whatever the depth: every layer goes through one
inner `jax.jit` whose static argument, the layer's graph definition, is equal for equal layers.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jpaged.models.attention import AttentionMetadata
from jpaged.models.config import ModelConfig
from jpaged.models.layers import MLP, Attention, Embedding, RMSNorm, matmul
from jpaged.models.rope import Rope, make_rope, rope_frequencies


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: ModelConfig, *, sliding_window: int | None, dtype: jax.typing.DTypeLike
    ):
        eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, sliding_window=sliding_window, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype)

    def __call__(
        self, x: Array, rope: Rope, pool: Array, metadata: AttentionMetadata
    ) -> tuple[Array, Array]:
        """Returns the stream after this layer, and its pool."""
        attended, pool = self.self_attn(self.input_layernorm(x), rope, pool, metadata)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), pool


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(
    graphdef: nnx.GraphDef[DecoderLayer],
    state: nnx.State,
    x: Array,
    rope: Rope,
    pool: Array,
    metadata: AttentionMetadata,
) -> tuple[Array, Array]:
    return nnx.merge(graphdef, state)(x, rope, pool, metadata)


class LlamaForCausalLM(nnx.Module):
    """Embedding, decoder layers, final norm and output projection."""

    def __init__(self, config: ModelConfig, *, dtype: jax.typing.DTypeLike):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nnx.List(
            DecoderLayer(config, sliding_window=window, dtype=dtype)
            for window in config.layer_windows
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        )
        self.config = config

    @staticmethod
    def read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the config fields that are this family's own, from a ``config.json``."""
        bias = bool(raw.get("attention_bias", False))
        return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", False))}

    def __call__(
        self,
        token_ids: Int[Array, "num_tokens"],
        positions: Int[Array, "num_tokens"],
        pools: tuple[Array, ...],
        metadata: AttentionMetadata,
    ) -> tuple[Float[Array, "num_tokens hidden_size"], tuple[Array, ...]]:
        """Returns the stream after the final norm, and the pools with this step's K and V."""
        config = self.config
        rope = make_rope(
            positions,
            *rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling),
        )
        # The host has checked the ids; the clip only keeps padding harmless.
        x = self.embed_tokens.weight[...].at[token_ids].get(mode="clip")
        new_pools = []
        for layer, pool in zip(self.layers, pools, strict=True):
            x, pool = _run_layer(*nnx.split(layer), x, rope, pool, metadata)
            new_pools.append(pool)
        return self.norm(x), tuple(new_pools)

    @staticmethod
    def project(
        hidden: Float[Array, "num_rows hidden_size"], table: Float[Array, "vocab_size hidden_size"]
    ) -> Float[Array, "num_rows vocab_size"]:
        """Returns f32 logits; contracts the table's last axis, so that no transpose is made."""
        return matmul(hidden, table, contract=(1, 1)).astype(jnp.float32)
