"""The parts that the families share: linear, norm, attention over the block pool, gated MLP.

Weights are stored [in, out]: measured on CPU, `x @ w` is faster that way as soon as a batch has
two tokens. Every matmul accumulates in float32; float32 weights are multiplied in full float32 on
every device, never in a shorter format.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jpaged.models.attention import AttentionMetadata
from jpaged.models.config import ModelConfig
from jpaged.models.rope import Rope, rotate
from jpaged.pallas_kernels import (
    add_rms_norm,
    linear,
    num_splits,
    paged_attention,
    rms_norm,
    rope_write_kv,
    write_kv,
)
from jpaged.pallas_kernels.paged_attention import Schedule


def matmul(x: Array, w: Array, *, contract: tuple[int, int] = (1, 0)) -> Array:
    """Returns f32 `x @ w`, contracting the given axis of each."""
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        w,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


class Linear(nnx.Module):
    """A projection `x @ kernel (+ bias)`.

    With `sum_over`, a mesh axis, x and kernel are a device's share of the contraction, and what all
    devices get is the sum over them.
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        bias: bool,
        dtype: jax.typing.DTypeLike,
        sum_over: str | None = None,
    ):
        self.kernel = nnx.Param(jnp.zeros((size_in, size_out), dtype))
        self.bias = nnx.Param(jnp.zeros((size_out,), dtype)) if bias else None
        self.sum_over = sum_over

    def __call__(self, x: Float[Array, "num_tokens size_in"]) -> Float[Array, "num_tokens out"]:
        """Returns the projection of x, in x's dtype."""
        if self.sum_over is not None:
            out = jax.lax.psum(linear(x, self.kernel[...]), self.sum_over)
        elif self.bias is not None:
            out = linear(x, self.kernel[...], out_dtype=jnp.float32)
        else:
            out = linear(x, self.kernel[...])
        if self.bias is None:
            return out
        biased = out.astype(jnp.float32) + self.bias[...].astype(jnp.float32)[None, :]
        return biased.astype(x.dtype)

    def parts(self, x: Float[Array, "num_tokens size_in"]) -> Float[Array, "*parts num_tokens out"]:
        """Returns the projection, or float32 parts of it where those are faster to compute.

        For a reader that can add them on its way.
        """
        kernel = self.kernel[...]
        if self.bias is not None or self.sum_over is not None:
            return self(x)
        splits = num_splits(x.shape[0], *kernel.shape, dtype=x.dtype)
        return linear(x, kernel, num_splits=splits)


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis; the mean is taken in float32."""

    def __init__(self, size: int, *, eps: float, dtype: jax.typing.DTypeLike):
        self.weight = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        """Returns x normalised, in x's dtype."""
        return rms_norm(x, self.weight[...], self.eps)

    def after_adding(
        self,
        delta: Float[Array, "*parts num_tokens size"] | None,
        residual: Float[Array, "num_tokens size"],
    ) -> tuple[Float[Array, "num_tokens size"], Float[Array, "num_tokens size"]]:
        """Returns the stream with delta (whole or in parts) added to it, and that normalised."""
        return add_rms_norm(residual, delta, self.weight[...], self.eps)


class Embedding(nnx.Module):
    """A table of one row a token: the input embedding, or the output projection.

    With `axis`, a mesh axis, the rows are a device's share of the vocabulary.
    """

    def __init__(
        self, vocab_size: int, size: int, *, dtype: jax.typing.DTypeLike, axis: str | None = None
    ):
        self.weight = nnx.Param(jnp.zeros((vocab_size, size), dtype))
        self.axis = axis

    def rows(self, token_ids: Int[Array, "num_tokens"]) -> Float[Array, "num_tokens size"]:
        """Returns the tokens' rows. The host has checked the ids; padding may hold any."""
        table = self.weight[...]
        if self.axis is None:
            return table.at[token_ids].get(mode="clip")
        num_rows = table.shape[0]
        local_ids = token_ids - jax.lax.axis_index(self.axis) * num_rows
        is_mine = (local_ids >= 0) & (local_ids < num_rows)
        rows = table.at[local_ids].get(mode="clip")
        return jax.lax.psum(jnp.where(is_mine[:, None], rows, jnp.zeros_like(rows)), self.axis)


class Attention(nnx.Module):
    """Grouped-query attention that writes to and reads from one layer's block pool."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        sliding_window: int | None,
        dtype: jax.typing.DTypeLike,
        axis: str | None = None,
    ):
        size = config.num_heads * config.head_dim
        self.qkv_proj = Linear(
            config.hidden_size, config.qkv_size, bias=config.qkv_bias, dtype=dtype
        )
        self.o_proj = Linear(
            size, config.hidden_size, bias=config.o_bias, dtype=dtype, sum_over=axis
        )
        norm = functools.partial(RMSNorm, config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.sliding_window = sliding_window

    def __call__(
        self,
        x: Float[Array, "num_tokens hidden_size"],
        rope: Rope,
        pool: Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"],
        metadata: AttentionMetadata,
        schedule: Schedule,
    ) -> tuple[Float[Array, "*parts num_tokens hidden_size"], Array]:
        """Returns what attention adds to the stream, and the pool with this step's K and V."""
        slots = metadata.slot_mapping
        if self.q_norm is not None and self.k_norm is not None:
            qkv = self.qkv_proj(x).reshape(x.shape[0], -1, self.head_dim)
            q, k, v = jnp.split(qkv, [self.num_heads, self.num_heads + self.num_kv_heads], axis=1)
            q = rotate(self.q_norm(q), rope)
            pool = write_kv(pool, rotate(self.k_norm(k), rope), v, slots)
        else:
            qkv = self.qkv_proj.parts(x)
            pool, q = rope_write_kv(
                pool,
                qkv,
                rope.cos,
                rope.sin,
                slots,
                num_heads=self.num_heads,
                q_dtype=x.dtype,
            )
        out = paged_attention(
            q,
            pool,
            metadata.block_tables,
            metadata.seq_lens,
            metadata.query_start_loc,
            scale=self.head_dim**-0.5,
            sliding_window=self.sliding_window,
            max_query_len=metadata.max_query_len,
            schedule=schedule,
            implementation=metadata.implementation,
        )
        return self.o_proj.parts(out.reshape(x.shape[0], -1)), pool


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))` with gate and up in one projection."""

    def __init__(
        self, config: ModelConfig, *, dtype: jax.typing.DTypeLike, axis: str | None = None
    ):
        size, width = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(size, 2 * width, bias=config.mlp_bias, dtype=dtype)
        self.down_proj = Linear(width, size, bias=config.mlp_bias, dtype=dtype, sum_over=axis)

    def __call__(
        self, x: Float[Array, "num_tokens size"]
    ) -> Float[Array, "*parts num_tokens size"]:
        """Returns what the MLP adds to the stream, maybe in parts."""
        if self.gate_up_proj.bias is None:
            hidden = linear(x, self.gate_up_proj.kernel[...], activation="silu_mul")
        else:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
            hidden = jax.nn.silu(gate) * up
        return self.down_proj.parts(hidden)
