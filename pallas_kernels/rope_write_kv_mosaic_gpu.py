"""Rotation of Q and K and the KV write on Mosaic GPU, in one kernel: one program a token.

The two halves of a head are loaded as separate arrays of one layout, so that a pair lies in one
thread and nothing crosses lanes. Small batches split a token's heads over several programs.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jpaged.pallas_kernels import write_kv_mosaic_gpu
from jpaged.pallas_kernels.mosaic_gpu import num_sms, store
from jpaged.pallas_kernels.write_kv_mosaic_gpu import find_slot, num_groups, row_tiles


def unsupported_reasons(pool: jax.Array, num_tokens: int) -> list[str]:
    """Why the kernel cannot serve this problem on a GPU that it runs on; empty if it can."""
    return write_kv_mosaic_gpu.unsupported_reasons(pool, num_tokens)


def rope_write_kv(
    pool: Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"],
    qkv: Float[Array, "*num_parts num_tokens qkv_size"],
    cos: Float[Array, "num_tokens half_head_dim"],
    sin: Float[Array, "num_tokens half_head_dim"],
    slot_mapping: Int32[Array, " num_tokens"],
    *,
    num_heads: int,
    interpret: bool = False,
) -> tuple[
    Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"],
    Float[Array, "num_tokens num_heads head_dim"],
]:
    """See `rope_write_kv.rope_write_kv`; `interpret` runs it on the CPU."""
    _, _, num_kv_heads, _, head_dim = pool.shape
    num_tokens, dtype, half = qkv.shape[-2], pool.dtype, head_dim // 2
    parts = [(part,) for part in range(qkv.shape[0])] if qkv.ndim == 3 else [()]
    groups = num_groups(
        num_kv_heads, num_heads * head_dim, spread=min(pl.cdiv(num_sms(), num_tokens), 8)
    )
    # Heads of a group, and the first head of each kind in a row of qkv.
    kinds = {
        "q": (num_heads // groups, 0),
        "k": (num_kv_heads // groups, num_heads),
        "v": (num_kv_heads // groups, num_heads + num_kv_heads),
    }

    def body(qkv_ref, *refs):
        *angle_refs, slots_ref, pool_ref, q_ref = refs
        angle_refs = {"q": angle_refs[:2], "k": angle_refs[2:]}
        token, group = lax.axis_index("token"), lax.axis_index("group")
        block, offset, in_pool = find_slot(slots_ref[token], pool)
        sides = (pl.ds(0, half), pl.ds(half, half))

        def load(rows, columns, layout):
            refs = [qkv_ref.at[(*part, token, rows, columns)] for part in parts]
            loaded = [plgpu.load(ref, layout=layout, optimized=False) for ref in refs]
            return functools.reduce(jnp.add, loaded).astype(dtype)

        tiles = []
        for kind, (heads, first) in kinds.items():
            for start, num_rows, layout in row_tiles(heads, half):
                start = group * heads + start
                pair = [load(pl.ds(first + start, num_rows), side, layout) for side in sides]
                if kind != "v":
                    angles = [
                        plgpu.load(ref.at[token], layout=layout.reduce(0), optimized=False)
                        for ref in angle_refs[kind]
                    ]
                    pair = _rotate(*pair, *angles, layout)
                tiles.append((kind, pl.ds(start, num_rows), pair))

        for kind, rows, pair in tiles:
            if kind == "q":
                for side, x in zip(sides, pair, strict=True):
                    store(q_ref.at[token, rows, side], x)

        @pl.when(in_pool)
        def _():
            for kind, rows, pair in tiles:
                if kind != "q":
                    for side, x in zip(sides, pair, strict=True):
                        store(pool_ref.at[block, "kv".index(kind), rows, offset, side], x)

    return write_kv_mosaic_gpu.call_in_place(
        body,
        pool,
        # Angles go in once for q and once for k: two loads of one address would be merged into one,
        # which has one layout.
        (qkv.reshape(*qkv.shape[:-1], -1, head_dim), cos, sin, cos, sin, slot_mapping),
        out_type=(jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), dtype),),
        grid=(num_tokens, groups),
        name="rope_write_kv",
        interpret=interpret,
    )


def _rotate(first: Array, second: Array, cos: Array, sin: Array, layout) -> tuple[Array, Array]:
    dtype, shape = first.dtype, first.shape
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    cos, sin = (plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [1]), layout) for x in (cos, sin))
    rotated = first * cos - second * sin, second * cos + first * sin
    return tuple(x.astype(dtype) for x in rotated)
