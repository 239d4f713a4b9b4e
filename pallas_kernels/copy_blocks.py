"""Copying whole blocks inside the pool: what copy-on-write asks for."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def copy_blocks(
    pool: Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"],
    src: Int32[Array, " num_copies"],
    dst: Int32[Array, " num_copies"],
) -> Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"]:
    """The pool with block `dst[i]` holding what block `src[i]` held, for all `i` at once.

    All sources are read before any destination is written. A pair with an id outside the pool is
    dropped; padding pairs copy the null block onto itself. After section 5.1 of the PagedAttention
    paper (fused block copy).

    Raises:
        ValueError: `src` and `dst` are not of one length.
    """
    if src.ndim != 1 or src.shape != dst.shape:
        raise ValueError(f"src and dst must be [num_copies], got {src.shape=}, {dst.shape=}")
    num_blocks = pool.shape[0]
    in_pool = (src >= 0) & (src < num_blocks) & (dst >= 0)
    return pool.at[jnp.where(in_pool, dst, num_blocks)].set(pool[src], mode="drop")
