"""Shape of the block pool: the one place that knows how keys and values lie in memory.

One array a layer, `[num_blocks, 2, num_kv_heads, block_size, head_dim]`: index 0 of the second axis
is K, index 1 is V. A block is one contiguous piece, so that copies and swaps move it whole; inside
it the tokens of a head are contiguous, which is what a tile of attention reads. Block 0 is the null
block: padding writes there, and nothing real is ever read from it.
"""

import dataclasses

import jax
import jax.numpy as jnp

NULL_BLOCK = 0
BLOCK_SIZES = (8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KVCacheSpec:
    """What one layer's pool holds, apart from how many blocks there are."""

    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size}")

    def shape(self, num_blocks: int) -> tuple[int, int, int, int, int]:
        """Shape of a pool of `num_blocks` blocks, the null block among them."""
        return (num_blocks, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer, K and V together."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * self.dtype.itemsize

    def allocate(self, num_blocks: int) -> jax.Array:
        """A zeroed pool: masked weights times stale NaNs would still be NaN."""
        return jnp.zeros(self.shape(num_blocks), self.dtype)
