"""Attention of prefill chunks over the blocks of a pool, on Hopper GPUs: schedule and call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jpaged.pallas_kernels import mosaic_gpu
from jpaged.pallas_kernels.paged_attention import mosaic_gpu_chunks_kernel as kernel

HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)

# Tiles of a sequence that run side by side, in tokens: they read the same K and V, from L2 if
# together. Their order ignores that their contexts differ, which costs balance: within one step
# over K and V it is free, and far below a long context it is negligible.
RUN_TOKENS = 128
LONG_RUN_TOKENS = 512
LONG_CONTEXT = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkSchedule:
    """The work items of a step's chunks, longest context first. The same for every layer.

    Attributes:
        items: Rows of `kernel.ITEM_FIELDS` integers; rows past `num_items` are not read.
        num_items: How many rows there are.
    """

    items: Int32[Array, " max_items_x_fields"]
    num_items: Int32[Array, " 1"]


def unsupported_reasons(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: jax.typing.DTypeLike,
) -> list[str]:
    """Why the kernel cannot serve a model's attention; empty if it can."""
    reasons = []
    if jnp.dtype(dtype) not in map(jnp.dtype, DTYPES):
        reasons.append(f"dtype must be bfloat16 or float16, got {jnp.dtype(dtype)}")
    if head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim must be one of {HEAD_DIMS}, got {head_dim}")
    if block_size not in BLOCK_SIZES:
        reasons.append(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    if num_heads % num_kv_heads:
        reasons.append(
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
        )
    return reasons


def schedule_chunks(
    seq_lens: Int32[Array, " num_seqs"],
    query_start_loc: Int32[Array, " num_seqs_plus_1"],
    *,
    num_tokens: int,
    num_kv_heads: int,
    group_size: int,
) -> ChunkSchedule:
    """Cuts the sequences with more than one query into tiles and orders their work items.

    Longest context first, dealt to the programs in a snake: within a percent of the best division
    of work for causal prefill, and it needs neither a search nor an atomic counter. Adjacent tiles
    of a sequence form a run, which keeps its place as a whole; the items of a run are ordered by
    head, then tile, so that those which read the same K and V run at the same time.

    Args:
        seq_lens: Context lengths in tokens, this step's tokens included.
        query_start_loc: Prefix sum of the query lengths.
        num_tokens: Rows of the batch, padding included: bounds the number of tiles.
        num_kv_heads: KV heads of a layer.
        group_size: Query heads of one KV head.
    """
    tile_tokens = kernel.tokens_per_tile(group_size)
    packed_heads = kernel.heads_per_tile(group_size)
    tile_items = num_kv_heads * group_size // packed_heads
    num_seqs = seq_lens.shape[0]
    # A chunk has two tokens or more, so no more than half of the tokens can begin one.
    max_tiles = max(num_tokens // tile_tokens + min(num_seqs, num_tokens // 2), 1)
    starts, query_lens = query_start_loc[:-1], jnp.diff(query_start_loc)
    tiles_of = jnp.where(query_lens > 1, -(-query_lens // tile_tokens), 0)
    end_of = jnp.cumsum(tiles_of)
    num_tiles = end_of[-1]

    tile = jnp.arange(max_tiles, dtype=jnp.int32)
    seq = jnp.searchsorted(end_of, tile, side="right", method="compare_all").astype(jnp.int32)
    seq = jnp.minimum(seq, num_seqs - 1)
    from_end = end_of[seq] - 1 - tile

    def tiles_after_run(run_tokens: int):
        run_tiles = max(run_tokens // tile_tokens, 1)
        return from_end // run_tiles * run_tiles, run_tiles

    # A long run is a whole number of short ones, and long or not as a whole.
    after_long, long_tiles = tiles_after_run(LONG_RUN_TOKENS)
    after_short, short_tiles = tiles_after_run(RUN_TOKENS)
    is_long = seq_lens[seq] - after_long * tile_tokens > LONG_CONTEXT
    after = jnp.where(is_long, after_long, after_short)
    run_length = jnp.minimum(jnp.where(is_long, long_tiles, short_tiles), tiles_of[seq] - after)
    run_length = jnp.maximum(run_length, 1)  # of rows past the last tile
    run_start = end_of[seq] - after - run_length
    run_context = jnp.where(tile < num_tiles, seq_lens[seq] - after * tile_tokens, 0)
    order = jnp.argsort(-run_context, stable=True)  # keeps runs of equal contexts apart

    item = jnp.arange(max_tiles * tile_items, dtype=jnp.int32)
    tile = order[item // tile_items]
    in_run = (tile - run_start[tile]) * tile_items + item % tile_items
    head = in_run // run_length[tile] * packed_heads
    tile = run_start[tile] + in_run % run_length[tile]
    seq = seq[tile]
    skipped = (tile - (end_of - tiles_of)[seq]) * tile_tokens
    fields = {
        "token": starts[seq] + skipped,
        "num_tokens": jnp.minimum(query_lens[seq] - skipped, tile_tokens),
        "position": (seq_lens - query_lens)[seq] + skipped,
        "seq": seq,
        "seq_len": seq_lens[seq],
        "head": head,
    }
    items = jnp.stack([fields[name] for name in kernel.ITEM_FIELDS], axis=1)
    num_items = (num_tiles * tile_items)[None]
    return ChunkSchedule(
        items=items.astype(jnp.int32).reshape(-1), num_items=num_items.astype(jnp.int32)
    )


def attend_chunks(
    out_ref: Any | None,
    q: Float[Array, "num_tokens num_heads head_dim"],
    pool: Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"],
    block_tables: Int32[Array, "num_seqs max_blocks"],
    seq_lens: Int32[Array, " num_seqs"],
    query_start_loc: Int32[Array, " num_seqs_plus_1"],
    schedule: ChunkSchedule,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    config: kernel.Config | None = None,
    interpret: Any = None,
) -> Float[Array, "num_tokens num_heads head_dim"] | None:
    """Writes causal attention of the scheduled chunks into their rows of `out_ref`.

    See `jpaged.pallas_kernels.paged_attention`. Rows of sequences with one query, and rows that
    belong to no sequence, are left as they are.

    Args:
        out_ref: A `jax.new_ref` of q's shape and dtype; None to return a new array instead, whose
            other rows are undefined.
        q: Queries, flat over the batch.
        pool: The layer's block pool, see `kv_cache_layout`.
        block_tables: Physical block ids in order.
        seq_lens: Context lengths in tokens; the schedule holds them already.
        query_start_loc: Prefix sum of the query lengths; likewise.
        schedule: What `schedule_chunks` made of this batch.
        scale: Factor of the logits.
        sliding_window: A query sees this many tokens, itself included; all if None.
        soft_cap: Logits become `soft_cap * tanh(logits / soft_cap)`.
        config: Tile sizes; chosen by head size if None.
        interpret: `plgpu.InterpretGPUParams` to run on a CPU.

    Raises:
        NotImplementedError: The kernel cannot serve these shapes.
    """
    del seq_lens, query_start_loc
    num_blocks, _, num_kv_heads, block_size, head_dim = pool.shape
    reasons = unsupported_reasons(
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=q.dtype,
    )
    if reasons:
        raise NotImplementedError("; ".join(reasons))
    problem = kernel.Problem(
        num_tokens=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=jnp.dtype(q.dtype),
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    config = config or kernel.default_config(head_dim)
    attend = kernel.launch(
        problem,
        config,
        mosaic_gpu.num_sms() if interpret is None else 3,
        interpret,
        returns_out=out_ref is None,
    )
    out = attend(
        schedule.items,
        schedule.num_items,
        block_tables,
        problem.padded(q, interpret),
        pool.reshape(num_blocks * 2 * num_kv_heads, block_size, head_dim),
        *(() if out_ref is None else (out_ref,)),
    )
    return out if out_ref is None else None
