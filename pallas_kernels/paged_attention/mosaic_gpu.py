"""Paged attention on Hopper GPUs: decodes and chunks of one batch, each by its own kernel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jpaged.pallas_kernels.paged_attention import (
    mosaic_gpu_chunks,
    mosaic_gpu_combine,
    mosaic_gpu_decode,
    mosaic_gpu_decode_schedule,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Who computes what in a step; `chunks` is None where every sequence has one query."""

    decodes: mosaic_gpu_decode_schedule.DecodeSchedule
    chunks: mosaic_gpu_chunks.ChunkSchedule | None


def unsupported_reasons(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: jax.typing.DTypeLike,
) -> list[str]:
    """Why the kernels cannot serve a problem on a GPU that they run on; empty if they can."""
    decode = mosaic_gpu_decode_schedule.unsupported_reasons(
        num_heads, num_kv_heads, head_dim, block_size, dtype
    )
    chunks = mosaic_gpu_chunks.unsupported_reasons(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    return list(dict.fromkeys((*decode, *chunks)))


def make_schedule(
    block_tables: Int32[Array, "num_seqs max_blocks"],
    seq_lens: Int32[Array, " num_seqs"],
    query_start_loc: Int32[Array, " num_seqs_plus_1"],
    *,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: jax.typing.DTypeLike,
    sliding_window: int | None,
    max_query_len: int | None,
    num_programs: int | None = None,
    merge_inside: bool | None = None,
) -> Schedule:
    """See `jpaged.pallas_kernels.paged_attention.make_schedule`.

    `num_programs` is for tests: one a multiprocessor if None. `merge_inside` is as in
    `mosaic_gpu_decode_schedule.make_schedule`; the interpreter needs False.
    """
    chunks = None
    if max_query_len != 1:
        chunks = mosaic_gpu_chunks.schedule_chunks(
            seq_lens,
            query_start_loc,
            num_tokens=num_tokens,
            num_kv_heads=num_kv_heads,
            group_size=num_heads // num_kv_heads,
        )
    decodes = mosaic_gpu_decode_schedule.make_schedule(
        block_tables,
        seq_lens,
        query_start_loc,
        mosaic_gpu_decode_schedule.choose_geometry(
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            dtype,
            num_seqs=block_tables.shape[0],
        ),
        sliding_window=sliding_window,
        num_programs=num_programs,
        merge_inside=merge_inside,
    )
    return Schedule(decodes=decodes, chunks=chunks)


def paged_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    pool: Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"],
    block_tables: Int32[Array, "num_seqs max_blocks"],
    seq_lens: Int32[Array, " num_seqs"],
    query_start_loc: Int32[Array, " num_seqs_plus_1"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    max_query_len: int | None = None,
    schedule: Schedule | None = None,
    interpret: Any = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """See `jpaged.pallas_kernels.paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    if schedule is None:
        schedule = make_schedule(
            block_tables,
            seq_lens,
            query_start_loc,
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_kv_heads=pool.shape[2],
            head_dim=head_dim,
            block_size=pool.shape[3],
            dtype=q.dtype,
            sliding_window=sliding_window,
            max_query_len=max_query_len,
            merge_inside=None if interpret is None else False,
        )
    geometry = schedule.decodes.geometry
    options = {"scale": scale, "sliding_window": sliding_window, "soft_cap": soft_cap}
    chunk_out = None
    if schedule.chunks is not None:
        # It leaves rows undefined: those of decodes, and of padding, which decodes zero.
        chunk_out = mosaic_gpu_chunks.attend_chunks(
            None,
            q,
            pool,
            block_tables,
            seq_lens,
            query_start_loc,
            schedule.chunks,
            **options,
            interpret=interpret,
        )
    tiles = (num_tokens, -1, geometry.stored_rows, head_dim)
    is_padded = geometry.stored_rows != geometry.query_rows
    if chunk_out is not None and not is_padded:
        # Decodes write their rows between those of the chunks.
        ref = jax.new_ref(chunk_out.reshape(tiles))
        _, partial, stats = mosaic_gpu_decode.attend_decodes(
            q, pool, block_tables, schedule.decodes, **options, out_ref=ref, interpret=interpret
        )
        out = jax.freeze(ref)
    else:
        out, partial, stats = mosaic_gpu_decode.attend_decodes(
            q,
            pool,
            block_tables,
            schedule.decodes,
            **options,
            interpret=interpret,
        )
    if schedule.decodes.merges is not None:
        ref = jax.new_ref(out.reshape(num_tokens, geometry.head_groups, -1))
        mosaic_gpu_combine.combine(ref, partial, stats, schedule.decodes, interpret=interpret)
        out = jax.freeze(ref)
    out = out.reshape(tiles)[:, :, : geometry.query_rows]
    out = out.reshape(num_tokens, num_heads, head_dim)
    if chunk_out is not None and is_padded:
        is_decode = query_start_loc[1:] - query_start_loc[:-1] == 1
        rows = jnp.where(is_decode, query_start_loc[:-1], num_tokens)
        is_padding = jnp.arange(num_tokens) >= query_start_loc[-1]
        is_done = is_padding.at[rows].set(True, mode="drop")
        out = jnp.where(is_done[:, None, None], out, chunk_out)
    return out
