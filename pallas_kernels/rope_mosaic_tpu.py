"""Rotation of a step's queries and keys on TPUs, and their way from columns to heads.

A product leaves the heads of a token side by side, eight tokens in a tile; attention and the write
want a token's heads in a tile. XLA moves them in a pass of its own and rotates halves of registers;
here a head is rotated where it lies, a roll bringing each element its partner, and stored with a
stride that is the move.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpaged.pallas_kernels.mosaic_tpu import LANES, SUBLANES

# Tokens of a program at most, and those that are moved together: rows of 16 bits fill whole tiles.
MAX_TOKENS = 128
GROUP = 16
# Bytes of a program's heads, of which four copies are held.
BLOCK_BYTES = 3 * 2**19
VMEM_BYTES = 16 * 2**20
_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def unsupported_reasons(num_tokens: int, head_dim: int, dtype: jax.typing.DTypeLike) -> list[str]:
    """Why the kernel cannot serve this problem on a TPU; empty if it can."""
    reasons = []
    if head_dim != LANES:
        reasons.append(f"needs head_dim {LANES}, got {head_dim}")
    if jnp.dtype(dtype) not in _DTYPES:
        reasons.append(f"needs bfloat16 or float32, got {jnp.dtype(dtype)}")
    if num_tokens % SUBLANES:
        reasons.append(f"needs a multiple of {SUBLANES} tokens, got {num_tokens}")
    return reasons


def rotate_heads(
    qkv: Float[Array, "num_tokens qkv_size"],
    cos: Float[Array, "num_tokens half_head_dim"],
    sin: Float[Array, "num_tokens half_head_dim"],
    *,
    num_heads: int,
    num_kv_heads: int,
    interpret: Any = None,
) -> tuple[
    Float[Array, "num_tokens num_heads head_dim"],
    Float[Array, "num_tokens two_num_kv_heads head_dim"],
]:
    """Rotated queries, and rotated keys with the values behind them, as `write_rows` takes them.

    Args:
        qkv: The heads of queries, keys and values of each token, one after another.
        cos: f32 cosine of each pair's angle.
        sin: f32 sine of it.
        num_heads: Heads of queries.
        num_kv_heads: Heads of keys, and of values.
        interpret: `pltpu.InterpretParams` to run on a CPU.
    """
    num_tokens, width = qkv.shape
    num_rotated, num_rows = num_heads + num_kv_heads, width // LANES
    block = _block_tokens(num_tokens, width * qkv.dtype.itemsize)
    group = min(GROUP, block)
    stride = num_rows | 1  # odd, so that one store takes eight tokens
    # A head's other half comes with the sign that it has in the rotation.
    angles = jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)

    def body(qkv_ref, cos_ref, sin_ref, q_ref, kv_ref, wide_ref):
        @pl.loop(0, block // group)
        def _(i):
            first = pl.multiple_of(i * group, group)
            tokens = pl.ds(first, group)
            cos, sin = cos_ref[tokens], sin_ref[tokens]
            for head in range(num_rows):
                x = qkv_ref[tokens, head * LANES : (head + 1) * LANES].astype(jnp.float32)
                if head < num_rotated:
                    x = x * cos + pltpu.roll(x, LANES // 2, 1) * sin
                wide_ref[pl.ds(head, group, stride=stride)] = x
            for token in range(group):
                for ref, start, count in (
                    (q_ref, 0, num_heads),
                    (kv_ref, num_heads, 2 * num_kv_heads),
                ):
                    heads = wide_ref[pl.ds(token * stride + start, count)]
                    ref[first + token] = heads.astype(ref.dtype)

    def out(heads: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        shape = (num_tokens, heads, LANES)
        spec = pl.BlockSpec((block, heads, LANES), lambda i: (i, 0, 0))
        return jax.ShapeDtypeStruct(shape, qkv.dtype), spec

    (q_shape, q_spec), (kv_shape, kv_spec) = out(num_heads), out(2 * num_kv_heads)
    angle_spec = pl.BlockSpec((block, LANES), lambda i: (i, 0))
    return pl.pallas_call(
        body,
        grid=(num_tokens // block,),
        out_shape=(q_shape, kv_shape),
        in_specs=[pl.BlockSpec((block, width), lambda i: (i, 0)), angle_spec, angle_spec],
        out_specs=(q_spec, kv_spec),
        scratch_shapes=[pltpu.VMEM((group * stride, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        interpret=False if interpret is None else interpret,
        name="jpaged_rope",
    )(qkv, *angles)


def _block_tokens(num_tokens: int, token_bytes: int) -> int:
    """Tokens of a program: a power of two that divides them and whose heads fit."""
    block = min(MAX_TOKENS, num_tokens & -num_tokens)
    while block > GROUP and block * token_bytes > BLOCK_BYTES:
        block //= 2
    return block
