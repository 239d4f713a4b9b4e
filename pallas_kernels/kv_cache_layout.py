"""Shape of the block pool: the one place that knows how keys and values lie in memory.

One array a layer, in one of two layouts:

- "split", `[num_blocks, 2, num_kv_heads, block_size, head_dim]`: index 0 of the second axis is K,
  index 1 is V.
- "merged", `[num_blocks, 1, num_kv_heads, block_size, 2 * head_dim]`: a row is a token's K, then
  its V. For TPUs, whose rows have 128 elements, and heads of 64.

A block is one contiguous piece, so that copies and swaps move it whole; inside it the tokens of a
head are contiguous, which is what a tile of attention reads. Block 0 is the null block: padding
writes there, and nothing real is ever read from it.

Pools of 8 bits hold K and V divided by scales: one for all KV heads, or one each.
"""

import dataclasses
from typing import Literal, Self, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

NULL_BLOCK = 0
BLOCK_SIZES = (8, 16, 32, 64, 128)
# Of pools with scales.
EIGHT_BIT_DTYPES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))

Layout = Literal["split", "merged"]
Scale: TypeAlias = float | Float[Array, ""] | Float[Array, " num_kv_heads"]
"""What stored elements of K or V stand for, over the elements."""
Pool: TypeAlias = Num[Array, "num_blocks kinds num_kv_heads block_size row_size"]
"""A pool of either layout."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KVCacheSpec:
    """What one layer's pool holds, apart from how many blocks there are."""

    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    layout: Layout = "split"

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size}")

    @classmethod
    def of(cls, pool: jax.Array) -> Self:
        """The spec of a pool that is there.

        Raises:
            ValueError: It is none.
        """
        if pool.ndim != 5 or pool.shape[1] not in (1, 2) or pool.shape[4] % (3 - pool.shape[1]):
            raise ValueError(
                "pool must be [num_blocks, 2, num_kv_heads, block_size, head_dim] or "
                f"[num_blocks, 1, num_kv_heads, block_size, 2 * head_dim], got {pool.shape=}"
            )
        _, kinds, num_kv_heads, block_size, row_size = pool.shape
        return cls(
            block_size=block_size,
            num_kv_heads=num_kv_heads,
            head_dim=row_size * kinds // 2,
            dtype=pool.dtype,
            layout="split" if kinds == 2 else "merged",
        )

    def shape(self, num_blocks: int) -> tuple[int, int, int, int, int]:
        """Shape of a pool of `num_blocks` blocks, the null block among them."""
        return (num_blocks, self.kinds, self.num_kv_heads, self.block_size, self.row_size)

    @property
    def kinds(self) -> int:
        """Rows that a token has for a head: one of K and one of V, or one of both."""
        return 2 if self.layout == "split" else 1

    @property
    def row_size(self) -> int:
        """Elements of a row."""
        return 2 * self.head_dim // self.kinds

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer, K and V together."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * self.dtype.itemsize

    def allocate(self, num_blocks: int) -> jax.Array:
        """A zeroed pool: masked weights times stale NaNs would still be NaN."""
        return jnp.zeros(self.shape(num_blocks), self.dtype)


def stored(
    x: Float[Array, "num_tokens num_kv_heads head_dim"], scale: Scale | None, dtype: jnp.dtype
) -> Num[Array, "num_tokens num_kv_heads head_dim"]:
    """What a pool of this dtype holds of K or V.

    In 8 bits that is `x / scale` (1 if None), rounded to nearest, ties to even, and clipped to the
    finite numbers of the type.
    """
    if dtype not in EIGHT_BIT_DTYPES:
        return x
    x = x.astype(jnp.float32) / per_head(scale, x.shape[1])[:, None]
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(x), -128, 127).astype(dtype)
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -most, most).astype(dtype)


def per_head(scale: Scale | None, num_kv_heads: int) -> Float[Array, " num_kv_heads"]:
    """A scale for each KV head; 1 if None."""
    return jnp.broadcast_to(jnp.asarray(1.0 if scale is None else scale, jnp.float32), num_kv_heads)


def check_scales(spec: KVCacheSpec, k_scale: Scale | None, v_scale: Scale | None) -> None:
    """Raises `ValueError` where scales do not fit the pool they are for."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        if spec.dtype not in EIGHT_BIT_DTYPES:
            raise ValueError(f"{name} is for pools of 8 bits, got one of {spec.dtype}")
        if isinstance(scale, (int, float)):
            if not scale > 0:
                raise ValueError(f"{name} must be positive, got {scale}")
        elif scale.shape not in ((), (spec.num_kv_heads,)):
            raise ValueError(
                f"{name} must be a number or [num_kv_heads], got {scale.shape=} for "
                f"{spec.num_kv_heads} KV heads"
            )


def rows_of(
    k: Num[Array, "num_tokens num_kv_heads head_dim"],
    v: Num[Array, "num_tokens num_kv_heads head_dim"],
    layout: Layout,
) -> Num[Array, "num_tokens kinds num_kv_heads row_size"]:
    """What a pool of this layout holds of tokens."""
    if layout == "split":
        return jnp.stack([k, v], axis=1)
    return jnp.concatenate([k, v], axis=-1)[:, None]


def split_blocks(
    blocks: Num[Array, "*blocks kinds num_kv_heads block_size row_size"],
) -> Num[Array, "*blocks 2 num_kv_heads block_size head_dim"]:
    """Blocks taken from a pool of either layout, K and V apart."""
    if blocks.shape[-4] == 2:
        return blocks
    return jnp.concatenate(jnp.split(blocks, 2, axis=-1), axis=-4)
