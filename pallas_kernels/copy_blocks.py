"""Copying whole blocks inside the pool: what copy-on-write asks for."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from jpaged.pallas_kernels import mosaic_gpu, mosaic_tpu, registry
from jpaged.pallas_kernels.kv_cache_layout import Pool


def copy_blocks(
    pool: Pool,
    src: Int32[Array, " num_copies"],
    dst: Int32[Array, " num_copies"],
    *,
    implementation: registry.Implementation | None = None,
) -> Pool:
    """The pool with block `dst[i]` holding what block `src[i]` held, for all `i` at once.

    All sources are read before any destination is written. A pair with an id outside the pool is
    dropped; padding pairs copy the null block onto itself. After section 5.1 of the PagedAttention
    paper (fused block copy). An implementation that is named never falls back; None chooses.

    Raises:
        ValueError: `src` and `dst` are not of one length.
        NotImplementedError: The implementation asked for cannot serve the problem.
    """
    if src.ndim != 1 or src.shape != dst.shape:
        raise ValueError(f"src and dst must be [num_copies], got {src.shape=}, {dst.shape=}")

    def mosaic_gpu_reasons() -> list[str]:
        if reasons := list(mosaic_gpu.device_reasons()):
            return reasons
        from jpaged.pallas_kernels import copy_blocks_mosaic_gpu

        return copy_blocks_mosaic_gpu.unsupported_reasons(pool, src.shape[0])

    def mosaic_tpu_reasons() -> list[str]:
        if reasons := list(mosaic_tpu.device_reasons()):
            return reasons
        from jpaged.pallas_kernels import copy_blocks_mosaic_tpu

        return copy_blocks_mosaic_tpu.unsupported_reasons(pool, src.shape[0])

    name = registry.choose(
        "copy_blocks",
        implementation,
        {"mosaic_gpu": mosaic_gpu_reasons, "mosaic_tpu": mosaic_tpu_reasons, "xla": list},
    )
    if name == "mosaic_gpu":
        from jpaged.pallas_kernels import copy_blocks_mosaic_gpu

        return copy_blocks_mosaic_gpu.copy_blocks(pool, src, dst)
    if name == "mosaic_tpu":
        from jpaged.pallas_kernels import copy_blocks_mosaic_tpu

        return copy_blocks_mosaic_tpu.copy_blocks(pool, src, dst)
    return _xla(pool, src, dst)


def _xla(pool: Array, src: Array, dst: Array) -> Array:
    num_blocks = pool.shape[0]
    in_pool = (src >= 0) & (src < num_blocks) & (dst >= 0)
    return pool.at[jnp.where(in_pool, dst, num_blocks)].set(pool[src], mode="drop")
