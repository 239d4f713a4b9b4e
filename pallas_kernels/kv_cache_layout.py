"""Shape of the block pool: the one place that knows how keys and values lie in memory.

One array a layer, in one of two layouts:

- "split", `[num_blocks, 2, num_kv_heads, block_size, head_dim]`: index 0 of the second axis is K,
  index 1 is V.
- "merged", `[num_blocks, 1, num_kv_heads, block_size, 2 * head_dim]`: a row is a token's K, then
  its V. For TPUs, whose rows have 128 elements, and heads of 64.

A block is one contiguous piece, so that copies and swaps move it whole; inside it the tokens of a
head are contiguous, which is what a tile of attention reads. Block 0 is the null block: padding
writes there, and nothing real is ever read from it.
"""

import dataclasses
from typing import Literal, Self, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

NULL_BLOCK = 0
BLOCK_SIZES = (8, 16, 32, 64, 128)

Layout = Literal["split", "merged"]
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
