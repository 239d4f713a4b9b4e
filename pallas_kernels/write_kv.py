"""Writing the step's new keys and values into their slots of the block pool."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jpaged.pallas_kernels import mosaic_gpu, mosaic_tpu, registry
from jpaged.pallas_kernels.kv_cache_layout import (
    KVCacheSpec,
    Pool,
    Scale,
    check_scales,
    rows_of,
    stored,
)


def write_kv(
    pool: Pool,
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    slot_mapping: Int32[Array, " num_tokens"],
    *,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    implementation: registry.Implementation | None = None,
) -> Pool:
    """The pool with token `t` of `k` and `v` in slot `slot_mapping[t]`.

    In place where the pool is donated. A slot outside the pool is dropped, never clipped into a
    block that belongs to somebody; padding tokens point into the null block. A pool of 8 bits gets
    `k / k_scale` and `v / v_scale` (1 if None), rounded and clipped to its type; others take no
    scales. An implementation that is named never falls back; None chooses.

    Raises:
        ValueError: Shapes or dtypes contradict each other.
        NotImplementedError: The implementation asked for cannot serve the problem.
    """
    spec = KVCacheSpec.of(pool)
    if k.shape != v.shape or k.shape[1:] != (spec.num_kv_heads, spec.head_dim):
        raise ValueError(
            "k and v must be [num_tokens, num_kv_heads, head_dim] of the pool, "
            f"got {k.shape=}, {v.shape=}, {pool.shape=}"
        )
    if slot_mapping.shape != k.shape[:1]:
        raise ValueError(
            f"slot_mapping must be [num_tokens], got {slot_mapping.shape=}, {k.shape=}"
        )
    check_scales(spec, k_scale, v_scale)
    k, v = stored(k, k_scale, spec.dtype), stored(v, v_scale, spec.dtype)
    if k.dtype != pool.dtype or v.dtype != pool.dtype:
        raise ValueError(
            f"k and v must have the pool's dtype, got {k.dtype}, {v.dtype}, {pool.dtype}"
        )

    def mosaic_gpu_reasons() -> list[str]:
        if reasons := list(mosaic_gpu.device_reasons()):
            return reasons
        from jpaged.pallas_kernels import write_kv_mosaic_gpu

        return write_kv_mosaic_gpu.unsupported_reasons(pool, k.shape[0])

    def mosaic_tpu_reasons() -> list[str]:
        if reasons := list(mosaic_tpu.device_reasons()):
            return reasons
        from jpaged.pallas_kernels import write_kv_mosaic_tpu

        return write_kv_mosaic_tpu.unsupported_reasons(pool, k.shape[0])

    name = registry.choose(
        "write_kv",
        implementation,
        {"mosaic_gpu": mosaic_gpu_reasons, "mosaic_tpu": mosaic_tpu_reasons, "xla": list},
    )
    if name == "mosaic_gpu":
        from jpaged.pallas_kernels import write_kv_mosaic_gpu

        return write_kv_mosaic_gpu.write_kv(pool, k, v, slot_mapping)
    if name == "mosaic_tpu":
        from jpaged.pallas_kernels import write_kv_mosaic_tpu

        return write_kv_mosaic_tpu.write_kv(pool, k, v, slot_mapping)
    return _xla(pool, k, v, slot_mapping)


def _xla(pool: Array, k: Array, v: Array, slot_mapping: Array) -> Array:
    block_size = pool.shape[3]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    # A negative slot would count from the end of the pool; send it past the end instead.
    block = jnp.where(slot_mapping < 0, pool.shape[0], block)
    kv = rows_of(k, v, KVCacheSpec.of(pool).layout)
    return pool.at[block, :, :, offset].set(kv, mode="drop")
