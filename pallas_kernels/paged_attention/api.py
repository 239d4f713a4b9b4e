"""The public attention function: checks, choice of implementation, call."""

import functools
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jpaged.pallas_kernels import mosaic_gpu as gpu
from jpaged.pallas_kernels import mosaic_tpu as tpu
from jpaged.pallas_kernels import registry
from jpaged.pallas_kernels.kv_cache_layout import (
    EIGHT_BIT_DTYPES,
    KVCacheSpec,
    Pool,
    Scale,
    check_scales,
    per_head,
)
from jpaged.pallas_kernels.paged_attention import reference, xla

# Pallas is imported where a kernel runs only: it takes a CPU 0.2 s.
if TYPE_CHECKING:
    from collections.abc import Callable

    from jpaged.pallas_kernels.paged_attention import mosaic_gpu

Schedule: TypeAlias = "mosaic_gpu.Schedule | None"
"""What `make_schedule` returns: a pytree, or None for implementations that need none."""


def choose_implementation(
    requested: registry.Implementation | None, *, num_heads: int, spec: KVCacheSpec
) -> registry.Implementation:
    """The implementation that serves a model's attention here.

    Args:
        requested: A name that must be honoured, or None to choose.
        num_heads: Query heads.
        spec: One layer's pool.

    Raises:
        NotImplementedError: The one asked for cannot serve the model here.
    """

    def mosaic_gpu_reasons() -> list[str]:
        if reasons := list(gpu.device_reasons()):
            return reasons
        from jpaged.pallas_kernels.paged_attention import mosaic_gpu

        return gpu.layout_reasons(spec) or mosaic_gpu.unsupported_reasons(
            num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.dtype
        )

    def mosaic_tpu_reasons() -> list[str]:
        if reasons := list(tpu.device_reasons()):
            return reasons
        from jpaged.pallas_kernels.paged_attention import mosaic_tpu

        return mosaic_tpu.unsupported_reasons(num_heads, spec)

    candidates: dict[registry.Implementation, Callable[[], list[str]]] = {
        "mosaic_gpu": mosaic_gpu_reasons,
        "mosaic_tpu": mosaic_tpu_reasons,
        "xla": list,
        "reference": list,
    }
    return registry.choose("paged_attention", requested, candidates)


def make_schedule(
    pool: Pool,
    block_tables: Int32[Array, "num_seqs max_blocks"],
    seq_lens: Int32[Array, " num_seqs"],
    query_start_loc: Int32[Array, " num_seqs_plus_1"],
    *,
    num_tokens: int,
    num_heads: int,
    sliding_window: int | None = None,
    max_query_len: int | None = None,
    implementation: registry.Implementation | None = None,
) -> Schedule:
    """Who computes what in a batch: the same for all layers with one window, so made once a step.

    Args:
        pool: Any layer's pool; only its shape and dtype count.
        block_tables: As `paged_attention`.
        seq_lens: As `paged_attention`.
        query_start_loc: As `paged_attention`.
        num_tokens: Rows of q.
        num_heads: Query heads.
        sliding_window: As `paged_attention`.
        max_query_len: As `paged_attention`.
        implementation: As `paged_attention`.

    Raises:
        NotImplementedError: The implementation asked for cannot serve the problem.
    """
    spec = KVCacheSpec.of(pool)
    if choose_implementation(implementation, num_heads=num_heads, spec=spec) != "mosaic_gpu":
        return None
    from jpaged.pallas_kernels.paged_attention import mosaic_gpu

    return mosaic_gpu.make_schedule(
        block_tables,
        seq_lens,
        query_start_loc,
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=spec.block_size,
        dtype=spec.dtype,
        sliding_window=sliding_window,
        max_query_len=max_query_len,
    )


def paged_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    pool: Pool,
    block_tables: Int32[Array, "num_seqs max_blocks"],
    seq_lens: Int32[Array, " num_seqs"],
    query_start_loc: Int32[Array, " num_seqs_plus_1"],
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    max_query_len: int | None = None,
    schedule: Schedule = None,
    implementation: registry.Implementation | None = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """Causal attention of a ragged batch over the blocks its sequences own.

    The queries of sequence `s` are rows `query_start_loc[s]:query_start_loc[s + 1]`; they are the
    last tokens of a context of `seq_lens[s]` tokens whose K and V are already in the pool. Decode
    rows and chunks of prefill may be mixed in any order. Rows that belong to no sequence come out
    as zeros. After section 4.3 of the PagedAttention paper.

    Args:
        q: Queries, flat over the batch.
        pool: The layer's block pool, see `kv_cache_layout`.
        block_tables: Physical block ids in order; entries past a sequence's end may hold any valid
            block id (the null block by convention).
        seq_lens: Context lengths in tokens, this step's tokens included; of no account in a row
            without queries.
        query_start_loc: Prefix sum of the query lengths.
        scale: Factor of the logits; `head_dim ** -0.5` if None.
        sliding_window: A query sees this many tokens, itself included; all if None.
        soft_cap: Logits become `soft_cap * tanh(logits / soft_cap)`.
        k_scale: What an element of K in a pool of 8 bits stands for, as `write_kv`; 1 if None.
        v_scale: The same of V.
        max_query_len: Static upper bound of a query length, if known; 1: every row decodes.
        schedule: From `make_schedule` with the same arguments; made here if None.
        implementation: A name never falls back; None chooses.

    Raises:
        ValueError: Shapes or options contradict each other.
        NotImplementedError: The implementation asked for cannot serve the problem.
    """
    _check(q, pool, block_tables, seq_lens, query_start_loc, scale, sliding_window, soft_cap)
    if max_query_len is not None and max_query_len < 1:
        raise ValueError(f"max_query_len must be at least 1, got {max_query_len}")
    spec = KVCacheSpec.of(pool)
    check_scales(spec, k_scale, v_scale)
    name = choose_implementation(implementation, num_heads=q.shape[1], spec=spec)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if name != "reference":
        # Of no concern to who computes: of K a factor of the logits, of V one of the output.
        if isinstance(k_scale, (int, float)):
            scale *= k_scale
        else:
            q = _scaled(q, k_scale, spec.num_kv_heads)
    options = {
        "scale": scale,
        "sliding_window": sliding_window,
        "soft_cap": soft_cap,
        "max_query_len": max_query_len,
    }
    args = (q, pool, block_tables, seq_lens, query_start_loc)
    if name == "mosaic_gpu":
        from jpaged.pallas_kernels.paged_attention import mosaic_gpu

        return mosaic_gpu.paged_attention(*args, **options, schedule=schedule)
    if name == "reference":
        return reference.paged_attention(*args, **options, k_scale=k_scale, v_scale=v_scale)
    if name == "mosaic_tpu":
        out = _mosaic_tpu(*args, **options)
    else:
        out = xla.paged_attention(*args, **options)
    return _scaled(out, v_scale, spec.num_kv_heads)


@functools.partial(
    jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "max_query_len")
)
def _mosaic_tpu(*args: Any, **options: Any) -> jax.Array:
    """The kernels, traced once for all layers: a fifth of a step's tracing less."""
    from jpaged.pallas_kernels.paged_attention import mosaic_tpu

    return mosaic_tpu.paged_attention(*args, **options)


def _scaled(x: jax.Array, scale: Scale | None, num_kv_heads: int) -> jax.Array:
    """Query heads, or their outputs, times the scales of their KV heads."""
    if scale is None:
        return x
    factors = jnp.repeat(per_head(scale, num_kv_heads), x.shape[1] // num_kv_heads)
    return (x.astype(jnp.float32) * factors[:, None]).astype(x.dtype)


def _check(q, pool, block_tables, seq_lens, query_start_loc, scale, sliding_window, soft_cap):
    if q.ndim != 3 or pool.ndim != 5 or block_tables.ndim != 2:
        raise ValueError(
            "q, pool and block_tables must have 3, 5 and 2 axes, "
            f"got {q.shape=}, {pool.shape=}, {block_tables.shape=}"
        )
    spec = KVCacheSpec.of(pool)
    if spec.head_dim != q.shape[2]:
        raise ValueError(f"pool must be of heads with q's head_dim, got {q.shape=}, {pool.shape=}")
    if q.shape[1] % spec.num_kv_heads:
        raise ValueError(
            "num_heads must be a multiple of num_kv_heads, "
            f"got num_heads={q.shape[1]}, num_kv_heads={spec.num_kv_heads}"
        )
    if q.dtype != pool.dtype and spec.dtype not in EIGHT_BIT_DTYPES:
        raise ValueError(f"q and pool must have one dtype, got {q.dtype} and {pool.dtype}")
    num_seqs = block_tables.shape[0]
    if seq_lens.shape != (num_seqs,) or query_start_loc.shape != (num_seqs + 1,):
        raise ValueError(
            "seq_lens must be [num_seqs] and query_start_loc [num_seqs + 1], "
            f"got {block_tables.shape=}, {seq_lens.shape=}, {query_start_loc.shape=}"
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, got {soft_cap}")
