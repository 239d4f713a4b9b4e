"""Rotating a step's queries and keys and writing its keys and values, in one operation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jpaged.pallas_kernels import mosaic_gpu, mosaic_tpu, registry
from jpaged.pallas_kernels.add_rms_norm import merge_partials
from jpaged.pallas_kernels.kv_cache_layout import EIGHT_BIT_DTYPES, KVCacheSpec, Pool, Scale
from jpaged.pallas_kernels.write_kv import write_kv


def rope_write_kv(
    pool: Pool,
    qkv: Float[Array, "*num_parts num_tokens qkv_size"],
    cos: Float[Array, "num_tokens half_head_dim"],
    sin: Float[Array, "num_tokens half_head_dim"],
    slot_mapping: Int32[Array, " num_tokens"],
    *,
    num_heads: int,
    q_dtype: jax.typing.DTypeLike | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    implementation: registry.Implementation | None = None,
) -> tuple[
    Pool,
    Float[Array, "num_tokens num_heads head_dim"],
]:
    """The pool with the tokens' rotated keys and their values in their slots, and rotated queries.

    In place where the pool is donated. The two halves of a head are a pair; they are rotated in
    float32 and rounded once. Slots are as in `write_kv`: one outside the pool is dropped.

    Args:
        pool: The layer's block pool, see `kv_cache_layout`.
        qkv: The heads of queries, keys and values of each token, one after another, of `q_dtype`;
            or the partial sums f32[num_parts, num_tokens, qkv_size] of a matmul that was
            split over its contraction, which are added in order and rounded as the unsplit
            matmul's result.
        cos: f32 cosine of each pair's angle.
        sin: f32 sine of it.
        slot_mapping: Slot of each token's key and value.
        num_heads: Heads of queries.
        q_dtype: Of the queries; the pool's if None, and qkv's where the pool has 8 bits.
        k_scale: As `write_kv`.
        v_scale: As `write_kv`.
        implementation: A name never falls back; None chooses.

    Raises:
        ValueError: Shapes or dtypes contradict each other.
        NotImplementedError: The implementation asked for cannot serve the problem.
    """
    spec = KVCacheSpec.of(pool)
    is_eight_bit = spec.dtype in EIGHT_BIT_DTYPES
    q_dtype = jnp.dtype(q_dtype or (qkv.dtype if is_eight_bit else pool.dtype))
    if not is_eight_bit and q_dtype != pool.dtype:
        raise ValueError(f"q_dtype must be the pool's, got {q_dtype} and {pool.dtype}")
    _check(spec, qkv, cos, sin, slot_mapping, num_heads, q_dtype)

    def mosaic_gpu_reasons() -> list[str]:
        if reasons := list(mosaic_gpu.device_reasons()):
            return reasons
        from jpaged.pallas_kernels import rope_write_kv_mosaic_gpu

        return rope_write_kv_mosaic_gpu.unsupported_reasons(pool, qkv.shape[-2])

    def mosaic_tpu_reasons() -> list[str]:
        if reasons := list(mosaic_tpu.device_reasons()):
            return reasons
        from jpaged.pallas_kernels import write_kv_mosaic_tpu

        return write_kv_mosaic_tpu.unsupported_reasons(pool, qkv.shape[-2])

    name = registry.choose(
        "rope_write_kv",
        implementation,
        {"mosaic_gpu": mosaic_gpu_reasons, "mosaic_tpu": mosaic_tpu_reasons, "xla": list},
    )
    if name == "mosaic_gpu":
        from jpaged.pallas_kernels import rope_write_kv_mosaic_gpu

        return rope_write_kv_mosaic_gpu.rope_write_kv(
            pool, qkv, cos, sin, slot_mapping, num_heads=num_heads
        )
    if qkv.ndim == 3:
        qkv = merge_partials(qkv, q_dtype)
    if name == "mosaic_tpu" and _rotation(spec, qkv) == "mosaic_tpu":
        from jpaged.pallas_kernels import rope_mosaic_tpu, write_kv_mosaic_tpu

        q, kv = rope_mosaic_tpu.rotate_heads(
            qkv, cos, sin, num_heads=num_heads, num_kv_heads=spec.num_kv_heads
        )
        return write_kv_mosaic_tpu.write_rows(pool, kv, slot_mapping), q
    # The rotation by XLA, which fuses it with its neighbours, and the write by a kernel or XLA.
    qkv = qkv.reshape(qkv.shape[0], -1, spec.head_dim)
    q, k, v = jnp.split(qkv, [num_heads, num_heads + spec.num_kv_heads], axis=1)
    pool = write_kv(
        pool,
        rotate(k, cos, sin),
        v,
        slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
        implementation=name,
    )
    return pool, rotate(q, cos, sin)


def _rotation(spec: KVCacheSpec, qkv: jax.Array) -> registry.Implementation:
    """Who rotates what the TPU kernel writes."""

    def mosaic_tpu_reasons() -> list[str]:
        from jpaged.pallas_kernels import rope_mosaic_tpu

        reasons = rope_mosaic_tpu.unsupported_reasons(qkv.shape[0], spec.head_dim, qkv.dtype)
        if spec.dtype in EIGHT_BIT_DTYPES:
            reasons.append("does not scale keys and values for a pool of 8 bits")
        return reasons

    return registry.choose("rotate_heads", None, {"mosaic_tpu": mosaic_tpu_reasons, "xla": list})


def rotate(
    x: Float[Array, "num_tokens num_heads head_dim"],
    cos: Float[Array, "num_tokens half_head_dim"],
    sin: Float[Array, "num_tokens half_head_dim"],
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """Heads rotated by their tokens' angles; the two halves of a head are a pair."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _check(
    spec: KVCacheSpec,
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slot_mapping: jax.Array,
    num_heads: int,
    q_dtype: jnp.dtype,
) -> None:
    num_kv_heads, head_dim = spec.num_kv_heads, spec.head_dim
    if head_dim % 2:
        raise ValueError(f"pool must have an even head_dim, got {head_dim}")
    if num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            "num_heads must be a multiple of num_kv_heads, "
            f"got num_heads={num_heads}, num_kv_heads={num_kv_heads}"
        )
    qkv_size = (num_heads + 2 * num_kv_heads) * head_dim
    if qkv.ndim not in (2, 3) or qkv.shape[-1] != qkv_size or 0 in qkv.shape[:-2]:
        raise ValueError(
            "qkv must be [num_tokens, qkv_size] or [num_parts, num_tokens, qkv_size] with "
            f"qkv_size={qkv_size}, got {qkv.shape=}"
        )
    num_tokens = qkv.shape[-2]
    if cos.shape != (num_tokens, head_dim // 2) or sin.shape != cos.shape:
        raise ValueError(
            f"cos and sin must be [num_tokens, head_dim / 2], got {cos.shape=}, {sin.shape=}"
        )
    if slot_mapping.shape != (num_tokens,):
        raise ValueError(
            f"slot_mapping must be [num_tokens], got {slot_mapping.shape=}, {qkv.shape=}"
        )
    expected = q_dtype if qkv.ndim == 2 else jnp.dtype(jnp.float32)
    if qkv.dtype != expected:
        raise ValueError(f"qkv of {qkv.ndim} axes must be {expected}, got {qkv.dtype}")
    if cos.dtype != jnp.float32 or sin.dtype != jnp.float32:
        raise ValueError(f"cos and sin must be float32, got {cos.dtype}, {sin.dtype}")
