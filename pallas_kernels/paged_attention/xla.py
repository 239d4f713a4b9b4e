"""Paged attention in plain jnp, blockwise: for CPUs, older GPUs and what no kernel supports.

Never gathers a whole padded context: both paths walk a context in tiles of `TILE_KV` slots with an
online softmax (Milakov and Gimelshein 2018) and dynamic trip counts, so that the work follows the
real lengths of the batch, not the padded width of its block tables.

- Decode rows (query length 1) go in groups of rows of similar length, so that a group's longest
  context, up to which all its rows are walked, is close to its shortest.
- Chunks go in tiles of `tile_q` queries of one sequence.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jpaged.pallas_kernels.kv_cache_layout import Pool, split_blocks

# Slots of context a step of either loop reads: 128 was best of 64 to 256 on a 2-core CPU
# (benchmarks/cpu_choices.py).
TILE_KV = 128
# Queries of a chunk handled together.
TILE_Q = 64
# Decode rows handled together: on a CPU few, since a group walks to its longest context; an
# accelerator wants them all at once.
DECODE_GROUP_CPU = 4
DECODE_GROUP_ACCELERATOR = 64

# Finite, so that a row with nothing visible in a tile yields 0 and not inf - inf.
_MASKED = -1e30
_MAX_START = -1e20


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
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """See `jpaged.pallas_kernels.paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = pool.shape[2]
    grouped = q.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    tables = _padded_tables(block_tables, pool.shape[3])
    attend = functools.partial(
        _attend_tile, pool, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap
    )
    out = jnp.zeros_like(grouped)
    out = _decode_rows(out, grouped, attend, tables, seq_lens, query_start_loc, sliding_window)
    if max_query_len != 1:
        out = _chunks(
            out, grouped, attend, tables, seq_lens, query_start_loc, sliding_window, max_query_len
        )
    return out.reshape(num_tokens, num_heads, head_dim)


def _padded_tables(block_tables, block_size):
    """Tables as wide as a whole number of tiles: `[num_seqs, num_tiles, blocks_per_tile]`."""
    num_seqs, max_blocks = block_tables.shape
    per_tile = max(TILE_KV // block_size, 1)
    num_tiles = -(-max_blocks // per_tile)
    padded = jnp.pad(block_tables, ((0, 0), (0, num_tiles * per_tile - max_blocks)))
    return padded.reshape(num_seqs, num_tiles, per_tile)


def _attend_tile(
    pool, carry, q, blocks, first_slot, seq_lens, positions, *, scale, sliding_window, soft_cap
):
    """Folds one tile of context into the running softmax of several rows.

    Args:
        pool: The block pool.
        carry: Running max `[R, K, M]`, sum `[R, K, M]` and output `[R, K, M, D]`, all f32.
        q: Queries `[R, K, M, D]`: M is queries times heads of a group.
        blocks: Block ids of the tile, `[R, blocks_per_tile]`.
        first_slot: Context index of the tile's first slot.
        seq_lens: Context lengths `[R]`.
        positions: Context index of each query, `[R, M]`.
        scale: Factor of the logits.
        sliding_window: See `paged_attention`.
        soft_cap: See `paged_attention`.
    """
    running_max, running_sum, acc = carry
    # An id outside the pool shows as NaN instead of being clipped to somebody's block.
    if jnp.issubdtype(pool.dtype, jnp.integer):
        in_pool = (blocks >= 0) & (blocks < pool.shape[0])
        kv = pool.at[blocks].get(mode="clip").astype(q.dtype)
        kv = jnp.where(in_pool[:, :, None, None, None, None], kv, math.nan)
    else:
        kv = pool.at[blocks].get(mode="fill", fill_value=math.nan).astype(q.dtype)
    kv = split_blocks(kv)
    rows, per_tile, _, num_kv_heads, block_size, head_dim = kv.shape
    tile = per_tile * block_size
    kv = jnp.moveaxis(kv, 1, 3).reshape(rows, 2, num_kv_heads, tile, head_dim)
    slot = first_slot + jnp.arange(tile)
    # Slots past the end may hold anything; 0 x NaN would be NaN.
    v = jnp.where((slot < seq_lens[:, None])[:, None, :, None], kv[:, 1], 0)
    # float32 means float32: a GPU would take TF32 unless told otherwise.
    exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    logits = scale * jnp.einsum(
        "rkmd,rktd->rkmt", q, kv[:, 0], preferred_element_type=jnp.float32, precision=exact
    )
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    visible = slot <= positions[:, :, None]
    if sliding_window is not None:
        visible &= slot > positions[:, :, None] - sliding_window
    logits = jnp.where(visible[:, None], logits, _MASKED)
    new_max = jnp.maximum(running_max, logits.max(axis=-1))
    weights = jnp.exp(logits - new_max[..., None])
    rescale = jnp.exp(running_max - new_max)
    acc = acc * rescale[..., None] + jnp.einsum(
        "rkmt,rktd->rkmd",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
        precision=exact,
    )
    return new_max, running_sum * rescale + weights.sum(axis=-1), acc


def _start(shape, head_dim):
    return (
        jnp.full(shape, _MAX_START, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )


def _finish(carry, dtype):
    _, total, acc = carry
    return (acc / jnp.maximum(total, 1e-30)[..., None]).astype(dtype)


def _decode_rows(out, q, attend, tables, seq_lens, query_start_loc, sliding_window):
    """Adds to `out` the rows whose sequence has exactly one query."""
    num_tokens, num_kv_heads, group_size, head_dim = q.shape
    num_seqs = tables.shape[0]
    is_decode = (query_start_loc[1:] - query_start_loc[:-1]) == 1
    lens = jnp.where(is_decode, seq_lens, 0)
    by_length = jnp.argsort(-lens)
    on_cpu = jax.default_backend() == "cpu"
    rows = min(DECODE_GROUP_CPU if on_cpu else DECODE_GROUP_ACCELERATOR, num_seqs)
    num_groups = -(-jnp.count_nonzero(is_decode) // rows)
    by_length = jnp.pad(by_length, (0, -num_seqs % rows), constant_values=num_seqs)

    def group(i, out):
        seqs = lax.dynamic_slice_in_dim(by_length, i * rows, rows)
        group_lens = lens.at[seqs].get(mode="fill", fill_value=0)  # [rows]
        group_tables = tables.at[seqs].get(mode="fill", fill_value=0)
        token = jnp.where(group_lens > 0, query_start_loc[seqs], num_tokens)
        group_q = q.at[token].get(mode="fill", fill_value=0)  # [rows, K, G, D]
        positions = jnp.broadcast_to(group_lens[:, None] - 1, (rows, group_size))

        def tile(j, carry):
            return attend(carry, group_q, group_tables[:, j], j * TILE_KV, group_lens, positions)

        first, last = _tile_range(group_lens, group_lens, sliding_window)
        carry = lax.fori_loop(first, last, tile, _start((rows, num_kv_heads, group_size), head_dim))
        return out.at[token].set(_finish(carry, out.dtype), mode="drop")

    return lax.fori_loop(0, num_groups, group, out)


def _tile_range(first_query_lens, last_query_lens, sliding_window):
    """Tiles that some query sees; lengths are contexts up to and with a query, 0 for none."""
    last = -(-last_query_lens.max() // TILE_KV)
    if sliding_window is None:
        return 0, last
    no_query = jnp.iinfo(jnp.int32).max
    oldest = jnp.where(first_query_lens > 0, first_query_lens - sliding_window, no_query)
    return jnp.maximum(oldest.min(), 0) // TILE_KV, last


def _chunks(out, q, attend, tables, seq_lens, query_start_loc, sliding_window, max_query_len):
    """Adds to `out` the rows whose sequence has more than one query."""
    num_tokens, num_kv_heads, group_size, head_dim = q.shape
    tile_q = min(TILE_Q, num_tokens, max_query_len or num_tokens)
    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    tiles_of_seq = jnp.where(query_lens > 1, -(-query_lens // tile_q), 0)
    tiles_end = jnp.cumsum(tiles_of_seq)  # [S]
    q = jnp.pad(q, ((0, tile_q), (0, 0), (0, 0), (0, 0)))
    out = jnp.pad(out, ((0, tile_q), (0, 0), (0, 0), (0, 0)))

    def query_tile(i, out):
        seq = jnp.searchsorted(tiles_end, i, side="right", method="compare_all")
        first_row = (i - (tiles_end[seq] - tiles_of_seq[seq])) * tile_q
        token = query_start_loc[seq] + first_row
        seq_len = seq_lens[seq][None]
        row = first_row + jnp.arange(tile_q)
        is_mine = row < query_lens[seq]
        position = seq_len - query_lens[seq] + row  # [tile_q]
        tile_queries = lax.dynamic_slice_in_dim(q, token, tile_q)  # [tile_q, K, G, D]
        flat = jnp.moveaxis(tile_queries, 0, 1).reshape(1, num_kv_heads, -1, head_dim)
        positions = jnp.repeat(position, group_size)[None]

        def tile(j, carry):
            return attend(carry, flat, tables[seq, j][None], j * TILE_KV, seq_len, positions)

        in_context = jnp.minimum(position[-1:] + 1, seq_len)
        first, last = _tile_range(position[:1] + 1, in_context, sliding_window)
        carry = lax.fori_loop(
            first, last, tile, _start((1, num_kv_heads, tile_q * group_size), head_dim)
        )
        done = _finish(carry, out.dtype).reshape(num_kv_heads, tile_q, group_size, head_dim)
        # The tile may reach into the next sequence's rows: keep what stands there.
        old = lax.dynamic_slice_in_dim(out, token, tile_q)
        new = jnp.where(is_mine[:, None, None, None], jnp.moveaxis(done, 0, 1), old)
        return lax.dynamic_update_slice_in_dim(out, new, token, axis=0)

    return lax.fori_loop(0, tiles_end[-1], query_tile, out)[:num_tokens]
