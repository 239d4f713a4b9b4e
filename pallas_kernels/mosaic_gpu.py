"""What Mosaic GPU kernels share: when they can run, and how tiles lie in shared memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.pallas_kernels.kv_cache_layout import KVCacheSpec
from jpaged.pallas_kernels.target import target_platform

# Streaming multiprocessors of an H100 or H200 with SXM; kernels are persistent and launch one
# program on each.
DEFAULT_NUM_SMS = 132
# Bytes of shared memory a program may take on Hopper, less what Mosaic needs for its barriers.
SMEM_BYTES = 226 * 1024
MIN_JAX_VERSION = (0, 11, 0)


def device_reasons() -> tuple[str, ...]:
    """Why Mosaic GPU kernels cannot run on the target; empty if they can."""
    if (platform := target_platform()) != "gpu":
        return (f"the device is a {platform}, not an NVIDIA GPU",)
    return _gpu_reasons()


@functools.cache
def _gpu_reasons() -> tuple[str, ...]:
    if jax.__version_info__ < MIN_JAX_VERSION:
        return (f"needs jax {'.'.join(map(str, MIN_JAX_VERSION))} or later",)
    capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
    if capability != "9.0":
        return (f"needs compute capability 9.0 (Hopper), this GPU has {capability}",)
    return ()


def layout_reasons(spec: KVCacheSpec) -> list[str]:
    """Why the kernels cannot read a pool laid out like this; empty if they can."""
    return [] if spec.layout == "split" else [f"needs the split layout, got {spec.layout}"]


@functools.cache
def num_sms() -> int:
    """Multiprocessors of the default GPU; those of an H200 where there is none."""
    return int(getattr(jax.devices()[0], "core_count", None) or DEFAULT_NUM_SMS)


def store(ref: Any, value: jax.Array) -> None:
    """Stores registers to global memory, also where a warp does not fill whole cache lines."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    if hasattr(plgpu, "store"):  # from jax 0.12 on it must be said
        plgpu.store(ref, value, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        ref[...] = value


def swizzle_bytes(columns: int, dtype: jax.typing.DTypeLike) -> int:
    """The widest swizzle whose tiles divide rows of this many elements; 0 if there is none."""
    row_bytes = columns * jnp.dtype(dtype).itemsize
    return next((s for s in (128, 64, 32) if row_bytes % s == 0), 0)


def tile_transforms(columns: int, dtype: jax.typing.DTypeLike) -> tuple:
    """Tiling and swizzle of a shared-memory tile whose rows have this many elements.

    Raises:
        ValueError: The rows are no multiple of 32 bytes.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    swizzle = swizzle_bytes(columns, dtype)
    if not swizzle:
        raise ValueError(f"rows of a tile must be a multiple of 32 bytes, got {columns=}, {dtype=}")
    elements = swizzle // jnp.dtype(dtype).itemsize
    return (plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(swizzle))
