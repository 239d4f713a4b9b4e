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
from jpaged.pallas_kernels.paged_attention import Schedule, make_schedule


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        sliding_window: int | None,
        dtype: jax.typing.DTypeLike,
        axis: str | None = None,
    ):
        eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, sliding_window=sliding_window, dtype=dtype, axis=axis)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, axis=axis)

    def __call__(
        self,
        x: Array,
        delta: Array | None,
        rope: Rope,
        pool: Array,
        metadata: AttentionMetadata,
        schedule: Schedule,
    ) -> tuple[Array, Array, Array]:
        """Returns the stream, what this layer's MLP is yet to add to it, and the pool.

        `delta` is what the layer before is yet to add: additions wait for the norm behind them,
        which reads the stream anyway.
        """
        x, normed = self.input_layernorm.after_adding(delta, x)
        attended, pool = self.self_attn(normed, rope, pool, metadata, schedule)
        x, normed = self.post_attention_layernorm.after_adding(attended, x)
        return x, self.mlp(normed), pool


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(
    graphdef: nnx.GraphDef[DecoderLayer], state: nnx.State, *args: Any
) -> tuple[Array, Array, Array]:
    return nnx.merge(graphdef, state)(*args)


class LlamaForCausalLM(nnx.Module):
    """Embedding, decoder layers, final norm and output projection.

    With `axis`, a mesh axis, it is one device's share of the model, and `config` that share's.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: jax.typing.DTypeLike, axis: str | None = None
    ):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, axis=axis)
        self.layers = nnx.List(
            DecoderLayer(config, sliding_window=window, dtype=dtype, axis=axis)
            for window in config.layer_windows
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Embedding(config.vocab_size, config.hidden_size, dtype=dtype, axis=axis)
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
        x = self.embed_tokens.rows(token_ids)
        schedules = {
            window: make_schedule(
                pools[0],
                metadata.block_tables,
                metadata.seq_lens,
                metadata.query_start_loc,
                num_tokens=x.shape[0],
                num_heads=config.num_heads,
                sliding_window=window,
                max_query_len=metadata.max_query_len,
                implementation=metadata.implementation,
            )
            for window in dict.fromkeys(config.layer_windows)
        }
        delta, new_pools = None, []
        for layer, pool in zip(self.layers, pools, strict=True):
            schedule = schedules[layer.self_attn.sliding_window]
            x, delta, pool = _run_layer(*nnx.split(layer), x, delta, rope, pool, metadata, schedule)
            new_pools.append(pool)
        return self.norm.after_adding(delta, x)[1], tuple(new_pools)

    @staticmethod
    def project(
        hidden: Float[Array, "num_rows hidden_size"], table: Float[Array, "vocab_size hidden_size"]
    ) -> Float[Array, "num_rows vocab_size"]:
        """Returns f32 logits; contracts the table's last axis, so that no transpose is made."""
        return matmul(hidden, table, contract=(1, 1)).astype(jnp.float32)
