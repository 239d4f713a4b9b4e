"""The KV write on Mosaic GPU: one program a token, all its heads in registers.

Also what the fused rotation shares with it: register layouts for the rows of some heads, and the
address of a token's slot. The pool is only ever indexed by block, head and offset: a flat offset
of its elements does not fit 32 bits.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jpaged.pallas_kernels.kv_cache_layout import KVCacheSpec
from jpaged.pallas_kernels.mosaic_gpu import layout_reasons, store

WARPS = 4
LANES = 32
MAX_TOKENS = 65535  # programs of a launch along the axis that tokens are on
MAX_VEC = 8  # 16-bit elements of a 16-byte load
# Elements of one kind (q, k or v) that a program may hold: 64 registers of a thread in f32.
MAX_ELEMENTS = 8192


def unsupported_reasons(pool: jax.Array, num_tokens: int) -> list[str]:
    """Why the kernel cannot serve this problem on a GPU that it runs on; empty if it can."""
    _, _, num_kv_heads, _, head_dim = pool.shape
    reasons = layout_reasons(KVCacheSpec.of(pool))
    if pool.dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"needs bfloat16 or float16, got {pool.dtype}")
    if head_dim % 16 or not 0 < head_dim <= 256:
        reasons.append(f"needs head_dim to be a multiple of 16 up to 256, got {head_dim}")
    if num_tokens > MAX_TOKENS:
        reasons.append(f"serves up to {MAX_TOKENS} tokens at once, got {num_tokens}")
    if not num_kv_heads or not num_tokens or not pool.shape[0]:
        reasons.append("nothing to write")
    return reasons


def write_kv(
    pool: Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    slot_mapping: Int32[Array, " num_tokens"],
    *,
    interpret: bool = False,
) -> Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"]:
    """See `write_kv.write_kv`; `interpret` runs it on the CPU."""
    num_tokens, num_kv_heads, head_dim = k.shape
    groups = num_groups(num_kv_heads, num_kv_heads * head_dim)
    heads = num_kv_heads // groups

    def body(k_ref, v_ref, slots_ref, pool_ref):
        token, group = lax.axis_index("token"), lax.axis_index("group")
        block, offset, in_pool = find_slot(slots_ref[token], pool)
        tiles = []
        for start, num_rows, layout in row_tiles(heads, head_dim):
            rows = pl.ds(group * heads + start, num_rows)
            for kind, ref in enumerate((k_ref, v_ref)):
                x = plgpu.load(ref.at[token, rows], layout=layout, optimized=False)
                tiles.append((kind, rows, x))

        @pl.when(in_pool)
        def _():
            for kind, rows, x in tiles:
                store(pool_ref.at[block, kind, rows, offset], x)

    return call_in_place(
        body,
        pool,
        (k, v, slot_mapping),
        out_type=(),
        grid=(num_tokens, groups),
        name="write_kv",
        interpret=interpret,
    )[0]


def call_in_place(
    body, pool: jax.Array, operands: tuple, *, out_type: tuple, grid: tuple, name: str, interpret
) -> tuple[jax.Array, ...]:
    """The pool after `body(*operand refs, pool ref, *output refs)`, and the outputs."""
    pool_ref = jax.new_ref(pool)
    outs = plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=("token", "group"),
        # No memory is both read and written by these kernels.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name=name,
    )(*operands, pool_ref)
    return (jax.freeze(pool_ref), *outs)


def num_groups(num_kv_heads: int, most_elements: int, *, spread: int = 1) -> int:
    """How many programs share a token's heads: as few as registers allow, but at least `spread`.

    Args:
        num_kv_heads: What the heads are cut by; a group has all queries of its KV heads.
        most_elements: Elements of the most numerous kind of head.
        spread: How many are wanted, so that a small batch keeps the device busy.
    """
    divisors = [g for g in range(1, num_kv_heads + 1) if num_kv_heads % g == 0]
    wanted = max(spread, pl.cdiv(most_elements, MAX_ELEMENTS))
    return next((g for g in divisors if g >= wanted), num_kv_heads)


def find_slot(slot: jax.Array, pool: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A slot's block and offset, and whether the pool has it; both are 0 where it does not."""
    num_blocks, _, _, block_size, _ = pool.shape
    block = lax.div(slot, jnp.int32(block_size))
    in_pool = (slot >= 0) & (block < num_blocks)
    block = jnp.where(in_pool, block, 0)
    offset = jnp.where(in_pool, lax.rem(slot, jnp.int32(block_size)), 0)
    return block, offset, in_pool


def row_tiles(num_rows: int, num_columns: int) -> list[tuple]:
    """How one warpgroup holds rows of 16-bit elements: (first row, rows, register layout).

    A layout's tile has a power of two of rows. Where that does not divide `num_rows`, a last tile
    of the same height overlaps the one before it, and both hold the same values.
    """
    layout, height = _tiled_layout(num_rows, num_columns)
    whole = num_rows // height * height
    tiles = [(0, whole, layout)]
    if whole < num_rows:
        tiles.append((num_rows - height, height, layout))
    return tiles


def _tiled_layout(num_rows: int, num_columns: int):
    """The layout with the widest loads that needs no more rows than these, and its tile's rows.

    If even single elements are fewer than the threads, several threads hold the same ones.
    """
    power_columns = num_columns & -num_columns
    power_rows = 1 << (num_rows.bit_length() - 1)
    vec = min(MAX_VEC, power_columns)
    while True:
        lane_columns = min(power_columns // vec, LANES)
        lane_rows = min(LANES // lane_columns, power_rows)
        warp_rows = min(WARPS, power_rows // lane_rows)
        if vec == 1 or lane_columns * lane_rows * warp_rows == LANES * WARPS:
            break
        vec //= 2
    height, width = warp_rows * lane_rows, lane_columns * vec
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((height, width), (lane_rows, width), (1, vec))),
        warp_dims=(plgpu.Replicated(WARPS // warp_rows), -6),
        lane_dims=(plgpu.Replicated(LANES // (lane_columns * lane_rows)), -4, -3),
        vector_dim=-1,
        _check_canonical=False,
    )
    # Mosaic takes a layout only in the form without dimensions of size 1.
    short = layout.to_mgpu().canonicalize()
    layout = plgpu.Layout.TILED(short.tiling, short.warp_dims, short.lane_dims, short.vector_dim)
    return layout, height
