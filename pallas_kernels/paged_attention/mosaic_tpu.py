"""Paged attention on TPUs: cuts a batch into items, and calls the kernel over them.

An item is a tile of queries of one sequence: one query for a decode, `tile_q` of them for a chunk.
Decodes and chunks go through the same kernel, with different tiles. The layout of the pool needs no
change: a block is one contiguous DMA, and the rows of a head in it are whole TPU tiles.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jpaged.pallas_kernels.kv_cache_layout import KVCacheSpec, Pool
from jpaged.pallas_kernels.mosaic_tpu import LANES, SUBLANES, pool_reasons
from jpaged.pallas_kernels.paged_attention import mosaic_tpu_kernel
from jpaged.pallas_kernels.paged_attention.mosaic_tpu_kernel import Items, Tiling

# Queries of a chunk's tile, at least: whole registers of a head's, in 16 bits.
LEAST_CHUNK = 2 * SUBLANES


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TileSizes:
    """Sizes of tiles; by the static schedules the same ones serve all generations.

    Attributes:
        kv_bytes: Context of a tile in bytes of K and V. Three tiles are held.
        chunk_rows: Rows of logits that a chunk's tile has for a KV head: queries times query heads.
        chunk_elements: Elements of all queries of a chunk's tile, at most: VMEM holds some twelve
            times as many.
        chunk_tokens: Tokens of context of a chunk's tile, at most.
    """

    kv_bytes: int = 4 * 2**20
    chunk_rows: int = 512
    chunk_elements: int = 4096 * 128
    chunk_tokens: int = 512


SIZES = TileSizes()


def unsupported_reasons(num_heads: int, spec: KVCacheSpec) -> list[str]:
    """Why the kernel cannot serve a problem on a TPU; empty if it can."""
    reasons = pool_reasons(spec)
    if num_heads * spec.row_size * LEAST_CHUNK > SIZES.chunk_elements:
        most = SIZES.chunk_elements // (LEAST_CHUNK * spec.row_size)
        reasons.append(f"takes up to {most} query heads, got {num_heads}")
    if spec.block_bytes > SIZES.kv_bytes:
        reasons.append(f"takes blocks of up to {SIZES.kv_bytes} bytes, got {spec.block_bytes}")
    return reasons


def choose_tiling(
    *,
    tile_q: int,
    num_heads: int,
    spec: KVCacheSpec,
    sizes: TileSizes = SIZES,
) -> Tiling:
    """How the kernel walks a problem; `tile_q` is 1 for decodes, else a power of two."""
    num_kv_heads, block_size = spec.num_kv_heads, spec.block_size
    group_size = num_heads // num_kv_heads
    # Heads whose query rows fill the sublanes of a register together.
    packed = max(
        n
        for n in range(1, num_kv_heads + 1)
        if num_kv_heads % n == 0 and (n == 1 or n * tile_q * group_size <= SUBLANES)
    )
    token_bytes = spec.kinds * num_kv_heads * max(spec.row_size, LANES) * spec.dtype.itemsize
    most = sizes.kv_bytes // token_bytes
    if tile_q > 1:
        most = min(most, sizes.chunk_tokens)
    blocks = min(LANES, max(1, most // block_size))
    return Tiling(
        tile_q=tile_q,
        group_size=group_size,
        num_kv_heads=num_kv_heads,
        packed_heads=packed,
        row_size=spec.row_size,
        block_size=block_size,
        blocks=1 << (blocks.bit_length() - 1),
    )


def chunk_tile_q(
    num_heads: int, spec: KVCacheSpec, max_query_len: int | None, sizes: TileSizes = SIZES
) -> int:
    """Queries of a chunk's tile: a power of two, at least `LEAST_CHUNK`."""
    most = sizes.chunk_rows * spec.num_kv_heads // num_heads
    most = min(most, sizes.chunk_elements // (num_heads * spec.row_size))
    if max_query_len is not None:
        most = min(most, 1 << (max_query_len - 1).bit_length())
    return 1 << (max(LEAST_CHUNK, most).bit_length() - 1)


def paged_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    pool: Pool,
    block_tables: Int32[Array, "num_seqs max_blocks"],
    seq_lens: Int32[Array, " num_seqs"],
    query_start_loc: Int32[Array, " num_seqs_plus_1"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    max_query_len: int | None = None,
    interpret: Any = None,
    sizes: TileSizes = SIZES,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """See `jpaged.pallas_kernels.paged_attention`.

    For tests, `interpret` takes `pltpu.InterpretParams`, and `sizes` makes tiles small.
    """
    num_tokens, num_heads, head_dim = q.shape
    spec = KVCacheSpec.of(pool)
    # In the merged layout a row is [K, V]: queries with zeros beside them see K only, and of what
    # weights make of whole rows V is the last part.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, spec.row_size - head_dim)))
    tables = _table_rows(block_tables)
    tile_qs = [1]
    if max_query_len != 1 and num_tokens > 1:
        tile_qs.append(chunk_tile_q(num_heads, spec, max_query_len, sizes))
    # What is of no sequence stays as it is.
    is_token = jnp.arange(num_tokens) < query_start_loc[-1]
    out = jnp.where(is_token[:, None, None], q, jnp.zeros_like(q))
    for tile_q in tile_qs:
        tiling = choose_tiling(tile_q=tile_q, num_heads=num_heads, spec=spec, sizes=sizes)
        out = mosaic_tpu_kernel.attend(
            out,
            pool,
            tables,
            _cut(
                seq_lens,
                query_start_loc,
                tiling,
                num_tokens=num_tokens,
                sliding_window=sliding_window,
            ),
            tiling,
            table_stride=tables.shape[0] // block_tables.shape[0],
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            interpret=interpret,
        )
    return out[:, :, spec.row_size - head_dim :]


def _table_rows(block_tables: jax.Array) -> jax.Array:
    """Tables in rows of as many ids as one copy into scalar memory takes: [rows, 1, LANES]."""
    padded = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % LANES)))
    return padded.reshape(-1, 1, LANES)


def _cut(seq_lens, query_start_loc, tiling, *, num_tokens, sliding_window) -> Items:
    """Cuts the queries that this tiling serves into items, those that have work first."""
    tile_q, tile_kv = tiling.tile_q, tiling.tile_kv
    num_seqs = seq_lens.shape[0]
    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    if tile_q == 1:
        items_of_seq = jnp.where(query_lens == 1, 1, 0)
        num_items = min(num_seqs, num_tokens)
    else:
        items_of_seq = jnp.where(query_lens > 1, -(-query_lens // tile_q), 0)
        num_items = num_tokens // tile_q + min(num_seqs, num_tokens // 2)
    end = jnp.cumsum(items_of_seq)
    item = jnp.arange(num_items)
    seq = jnp.searchsorted(end, item, side="right", method="compare_all")
    is_item = item < end[-1]
    seq = jnp.where(is_item, seq, 0)
    first_row = (item - (end[seq] - items_of_seq[seq])) * tile_q
    position = seq_lens[seq] - query_lens[seq] + first_row
    context = jnp.minimum(seq_lens[seq], position + tile_q)
    first_tile = jnp.zeros_like(seq)
    if sliding_window is not None:
        first_tile = jnp.maximum(position - sliding_window + 1, 0) // tile_kv
    num_tiles = jnp.where(is_item, -(-context // tile_kv) - first_tile, 0)
    return Items(
        seq=seq.astype(jnp.int32),
        first_token=(query_start_loc[seq] + first_row).astype(jnp.int32),
        position=position.astype(jnp.int32),
        context=context.astype(jnp.int32),
        first_tile=first_tile.astype(jnp.int32),
        last_tile=(first_tile + num_tiles - 1).astype(jnp.int32),
        num_steps=jnp.sum(num_tiles, dtype=jnp.int32)[None],
    )
