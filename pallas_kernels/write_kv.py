"""Writing the step's new keys and values into their slots of the block pool."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def write_kv(
    pool: Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    slot_mapping: Int32[Array, " num_tokens"],
) -> Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"]:
    """The pool with token `t` of `k` and `v` in slot `slot_mapping[t]`.

    In place where the pool is donated. A slot outside the pool is dropped, never clipped into a
    block that belongs to somebody; padding tokens point into the null block.

    Raises:
        ValueError: Shapes or dtypes contradict each other.
    """
    num_kv_heads, block_size, head_dim = pool.shape[2:]
    if k.shape != v.shape or k.shape[1:] != (num_kv_heads, head_dim):
        raise ValueError(
            "k and v must be [num_tokens, num_kv_heads, head_dim] of the pool, "
            f"got {k.shape=}, {v.shape=}, {pool.shape=}"
        )
    if slot_mapping.shape != k.shape[:1]:
        raise ValueError(
            f"slot_mapping must be [num_tokens], got {slot_mapping.shape=}, {k.shape=}"
        )
    if k.dtype != pool.dtype or v.dtype != pool.dtype:
        raise ValueError(
            f"k and v must have the pool's dtype, got {k.dtype}, {v.dtype}, {pool.dtype}"
        )
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    # A negative slot would count from the end of the pool; send it past the end instead.
    block = jnp.where(slot_mapping < 0, pool.shape[0], block)
    kv = jnp.stack([k, v], axis=1)  # [T, 2, K, D]
    return pool.at[block, :, :, offset].set(kv, mode="drop")
