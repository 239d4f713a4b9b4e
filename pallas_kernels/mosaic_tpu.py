"""What the TPU kernels share: when they can run, and what tiles they need."""

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels.kv_cache_layout import EIGHT_BIT_DTYPES, KVCacheSpec, Layout
from jpaged.pallas_kernels.target import target_platform

LANES = 128
SUBLANES = 8
# Elements of a row. Rows of 64 fill half a tile: XLA would copy the whole pool at each call to lay
# it out like that, so heads of 64 need the merged layout.
ROW_SIZES = (128, 256)
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32), *EIGHT_BIT_DTYPES)


def device_reasons() -> tuple[str, ...]:
    """Why Mosaic TPU kernels cannot run on the target; empty if they can."""
    platform = target_platform()
    return () if platform == "tpu" else (f"the device is a {platform}, not a TPU",)


def preferred_layout(head_dim: int) -> Layout:
    """The layout of a pool on the default device: merged where TPU kernels need it, else split."""
    return "merged" if not device_reasons() and 2 * head_dim == LANES else "split"


def pool_reasons(spec: KVCacheSpec) -> list[str]:
    """Why a pool's blocks are not whole TPU tiles; empty if they are."""
    reasons = []
    if spec.row_size not in ROW_SIZES:
        reasons.append(
            f"needs head_dim in {ROW_SIZES}, or half of one in the merged layout, "
            f"got {spec.head_dim} in the {spec.layout} layout"
        )
    if spec.dtype not in DTYPES:
        reasons.append(f"needs bfloat16, float32, int8 or float8_e4m3fn, got {spec.dtype}")
    elif spec.block_size % (rows := tile_rows(spec.dtype)):
        reasons.append(f"needs blocks of a multiple of {rows} tokens, got {spec.block_size}")
    return reasons


def tile_rows(dtype: jax.typing.DTypeLike) -> int:
    """Rows of a TPU tile: of narrow elements two or four rows lie in one, side by side."""
    return SUBLANES * 4 // jnp.dtype(dtype).itemsize
