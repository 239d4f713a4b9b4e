"""What the TPU kernels share: when they can run, and what tiles they need."""

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels.target import target_platform

LANES = 128
SUBLANES = 8
# Rows of 64 elements fill half a tile: XLA would copy the whole pool into such a layout each call.
HEAD_DIMS = (128, 256)
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def device_reasons() -> tuple[str, ...]:
    """Why Mosaic TPU kernels cannot run on the target; empty if they can."""
    platform = target_platform()
    return () if platform == "tpu" else (f"the device is a {platform}, not a TPU",)


def pool_reasons(block_size: int, head_dim: int, dtype: jax.typing.DTypeLike) -> list[str]:
    """Why a pool's blocks are not whole TPU tiles; empty if they are."""
    reasons = []
    if head_dim not in HEAD_DIMS:
        reasons.append(f"needs head_dim in {HEAD_DIMS}, got {head_dim}")
    if jnp.dtype(dtype) not in DTYPES:
        reasons.append(f"needs bfloat16 or float32, got {jnp.dtype(dtype)}")
    elif block_size % tile_rows(dtype):
        reasons.append(f"needs blocks of a multiple of {tile_rows(dtype)} tokens, got {block_size}")
    return reasons


def tile_rows(dtype: jax.typing.DTypeLike) -> int:
    """Rows of a TPU tile: 16-bit elements lie two by two, one row beside the next."""
    return SUBLANES * 4 // jnp.dtype(dtype).itemsize
