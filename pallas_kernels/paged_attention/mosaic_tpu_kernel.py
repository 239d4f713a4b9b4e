"""The TPU kernel: one loop over all tiles of context of all items, each fetched a step ahead.

A step computes one tile, starts the DMAs of the next one's blocks, and starts the DMA of the block
ids of the one after that into scalar memory, so that tables of any size stay in HBM. Steps run
through the items without a gap: the first tile of an item arrives while the last one before it is
computed.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

LANES = 128
SUBLANES = 8
VMEM_LIMIT_BYTES = 40 * 2**20
# Finite, so that a row with nothing visible in a tile yields 0 and not inf - inf.
_MASKED = -1e30
_MAX_START = -1e20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How a problem is cut: `packed_heads` KV heads share a product where their rows are few."""

    tile_q: int
    group_size: int
    num_kv_heads: int
    packed_heads: int
    head_dim: int
    block_size: int
    blocks: int

    @property
    def tile_kv(self) -> int:
        """Tokens of context of a tile."""
        return self.blocks * self.block_size

    @property
    def num_packs(self) -> int:
        """Products a tile takes."""
        return self.num_kv_heads // self.packed_heads

    @property
    def used_rows(self) -> int:
        """Rows of queries of a pack."""
        return self.packed_heads * self.group_size * self.tile_q

    @property
    def rows(self) -> int:
        """`used_rows`, padded to whole registers."""
        return -(-self.used_rows // SUBLANES) * SUBLANES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """Tiles of queries, those that have work first; tiles of context are counted inclusively."""

    seq: jax.Array  # i32[num_items]: row of the block tables
    position: jax.Array  # i32[num_items]: context index of the first query
    context: jax.Array  # i32[num_items]: tokens that the last query sees
    first_tile: jax.Array  # i32[num_items]
    last_tile: jax.Array  # i32[num_items]
    num_steps: jax.Array  # i32[1]: tiles of context of all items together


def attend(
    q: jax.Array,
    pool: jax.Array,
    tables: jax.Array,
    items: Items,
    tiling: Tiling,
    *,
    table_stride: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    interpret: Any = None,
) -> jax.Array:
    """Attention of each item, [num_items, num_packs, rows, packed_heads * head_dim].

    Args:
        q: Queries of the same shape, a pack's heads in a block diagonal.
        pool: The block pool.
        tables: Block ids, i32[num_seqs * table_stride, 1, LANES].
        items: What to compute; the output of items without work is undefined.
        tiling: How the problem is cut.
        table_stride: Rows of `tables` of a sequence.
        scale: Factor of the logits.
        sliding_window: See `paged_attention`.
        soft_cap: See `paged_attention`.
        interpret: `pltpu.InterpretParams` to run on a CPU.
    """
    scalars = (
        items.seq,
        items.position,
        items.context,
        items.first_tile,
        items.last_tile,
        items.num_steps,
    )
    body = _Body(
        tiling=tiling,
        table_stride=table_stride,
        num_blocks=pool.shape[0],
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    tile_shape = q.shape[1:]
    state = (tiling.num_packs, tiling.rows, LANES)
    call = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(scalars)
        + [pl.BlockSpec(memory_space=pl.ANY)] * 3,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[
            pltpu.VMEM((2, tiling.blocks, *pool.shape[1:]), pool.dtype),
            pltpu.SMEM((2, 1, LANES), jnp.int32),
            pltpu.VMEM((2, *tile_shape), q.dtype),
            pltpu.VMEM((2, *tile_shape), q.dtype),
            pltpu.VMEM(state, jnp.float32),
            pltpu.VMEM(state, jnp.float32),
            pltpu.VMEM(tile_shape, jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(
            disable_bounds_checks=True, vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        interpret=False if interpret is None else interpret,
        name="jpaged_attention",
    )
    return call(*scalars, q, pool, tables)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Body:
    """The kernel with its static options; called with the refs."""

    tiling: Tiling
    table_stride: int
    num_blocks: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None

    @property
    def __name__(self) -> str:
        return "jpaged_attention"

    def __call__(
        self,
        # Inputs
        seq_ref,  # i32[num_items], and so on: the fields of `Items`
        position_ref,
        context_ref,
        first_tile_ref,
        last_tile_ref,
        num_steps_ref,  # i32[1]
        q_ref,  # [num_items, num_packs, rows, packed_dim]
        pool_ref,  # [num_blocks, 2, num_kv_heads, block_size, head_dim]
        tables_ref,  # i32[num_seqs * table_stride, 1, LANES]
        # Outputs
        out_ref,  # as q_ref
        # Scratch
        kv_tiles,  # [2, blocks, 2, num_kv_heads, block_size, head_dim]
        table_tiles,  # i32[2, 1, LANES]
        q_tiles,  # [2, num_packs, rows, packed_dim]
        out_tiles,  # as q_tiles
        max_ref,  # f32[num_packs, rows, LANES]: every lane the same
        sum_ref,  # as max_ref
        acc_ref,  # f32[num_packs, rows, packed_dim]
        kv_arrived,
        table_arrived,
        q_arrived,
        out_left,
    ):
        t = self.tiling
        num_items = seq_ref.shape[0]
        num_steps = num_steps_ref[0]
        ids_per_row = LANES // t.blocks

        def following(item, tile):
            """The step after this one; what comes after the last one is never used."""
            is_last = tile == last_tile_ref[jnp.minimum(item, num_items - 1)]
            first_tile = first_tile_ref[jnp.minimum(item + 1, num_items - 1)]
            return jnp.where(is_last, item + 1, item), jnp.where(is_last, first_tile, tile + 1)

        def table_copy(step, item, tile):
            row = seq_ref[item] * self.table_stride + lax.div(tile, jnp.int32(ids_per_row))
            slot = lax.rem(step, jnp.int32(2))
            return pltpu.make_async_copy(
                tables_ref.at[row], table_tiles.at[slot], table_arrived.at[slot]
            )

        def q_copy(item):
            slot = lax.rem(item, jnp.int32(2))
            return pltpu.make_async_copy(q_ref.at[item], q_tiles.at[slot], q_arrived.at[slot])

        def out_copy(item):
            slot = lax.rem(item, jnp.int32(2))
            return pltpu.make_async_copy(out_tiles.at[slot], out_ref.at[item], out_left.at[slot])

        def blocks_of(item, tile):
            """Blocks of a tile that hold context."""
            tokens = context_ref[item] - tile * t.tile_kv
            return jnp.minimum(
                lax.div(tokens + t.block_size - 1, jnp.int32(t.block_size)), t.blocks
            )

        def start_block(slot, first_id, i):
            block = table_tiles[slot, 0, first_id + i]
            block = jnp.clip(block, 0, self.num_blocks - 1)
            pltpu.make_async_copy(
                pool_ref.at[block], kv_tiles.at[slot, i], kv_arrived.at[slot]
            ).start()

        def start_tile(step, item, tile):
            table_copy(step, item, tile).wait()
            slot = lax.rem(step, jnp.int32(2))
            first_id = lax.rem(tile, jnp.int32(ids_per_row)) * t.blocks
            count = blocks_of(item, tile)

            @pl.when(count == t.blocks)
            def _():
                for i in range(t.blocks):
                    start_block(slot, first_id, i)

            @pl.when(count < t.blocks)
            def _():
                lax.fori_loop(0, count, lambda i, _: start_block(slot, first_id, i), None)

            @pl.when(tile == first_tile_ref[item])
            def _():
                q_copy(item).start()

        def wait_tile(step, item, tile):
            slot = lax.rem(step, jnp.int32(2))
            count = blocks_of(item, tile)

            @pl.when(count == t.blocks)
            def _():
                pltpu.make_async_copy(
                    pool_ref.at[pl.ds(0, t.blocks)], kv_tiles.at[slot], kv_arrived.at[slot]
                ).wait()

            @pl.when(count < t.blocks)
            def _():
                def wait_block(i, _):
                    pltpu.make_async_copy(
                        pool_ref.at[0], kv_tiles.at[slot, i], kv_arrived.at[slot]
                    ).wait()

                lax.fori_loop(0, count, wait_block, None)

            # Weights of 0 times what stands past the context would still be NaN where that is.
            end = context_ref[item] - tile * t.tile_kv

            @pl.when(end < t.tile_kv)
            def _():
                def clear(i, _):
                    v = kv_tiles[slot, i, 1]
                    token = lax.broadcasted_iota(jnp.int32, v.shape, 1) + i * t.block_size
                    kv_tiles[slot, i, 1] = jnp.where(token < end, v, jnp.zeros_like(v))

                lax.fori_loop(lax.div(end, jnp.int32(t.block_size)), t.blocks, clear, None)

        def step_body(step, carry):
            item, tile, next_item, next_tile = carry
            after_item, after_tile = following(next_item, next_tile)

            @pl.when(step + 2 < num_steps)
            def _():
                table_copy(step, after_item, after_tile).start()

            @pl.when(step + 1 < num_steps)
            def _():
                start_tile(step + 1, next_item, next_tile)

            q_slot = lax.rem(item, jnp.int32(2))

            @pl.when(tile == first_tile_ref[item])
            def _():
                q_copy(item).wait()
                max_ref[...] = jnp.full_like(max_ref, _MAX_START)
                sum_ref[...] = jnp.zeros_like(sum_ref)
                acc_ref[...] = jnp.zeros_like(acc_ref)

            wait_tile(step, item, tile)
            self._attend_tile(
                q_tiles.at[q_slot],
                kv_tiles.at[lax.rem(step, jnp.int32(2))],
                max_ref,
                sum_ref,
                acc_ref,
                position_ref[item],
                tile * t.tile_kv,
            )

            @pl.when(tile == last_tile_ref[item])
            def _():
                @pl.when(item >= 2)
                def _():
                    out_copy(item - 2).wait()

                for pack in range(t.num_packs):
                    total = jnp.maximum(sum_ref[pack][:, :1], 1e-30)
                    out_tiles[q_slot, pack] = (acc_ref[pack] / total).astype(out_tiles.dtype)
                out_copy(item).start()

            return next_item, next_tile, after_item, after_tile

        @pl.when(num_steps > 0)
        def _():
            first = (jnp.int32(0), first_tile_ref[0])
            table_copy(0, *first).start()
            second = following(*first)

            start_tile(0, *first)

            @pl.when(num_steps > 1)
            def _():
                table_copy(1, *second).start()

            last_item, _, _, _ = lax.fori_loop(0, num_steps, step_body, (*first, *second))
            # The loop ends one item past the last.
            out_copy(last_item - 1).wait()

            @pl.when(last_item >= 2)
            def _():
                out_copy(last_item - 2).wait()

    def _attend_tile(self, q_ref, kv_ref, max_ref, sum_ref, acc_ref, position, first_slot):
        """Folds a tile of context into the running softmax of an item (Milakov and Gimelshein)."""
        t = self.tiling
        exact = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
        shape = (t.rows, t.tile_kv)
        slot = first_slot + lax.broadcasted_iota(jnp.int32, shape, 1)
        row = lax.broadcasted_iota(jnp.int32, shape, 0)
        query = position + (row & (t.tile_q - 1))
        visible = slot <= query
        if self.sliding_window is not None:
            visible &= slot > query - self.sliding_window

        def heads_side_by_side(kind, pack):
            heads = range(pack * t.packed_heads, (pack + 1) * t.packed_heads)
            return jnp.concatenate(
                [kv_ref[:, kind, head].reshape(t.tile_kv, t.head_dim) for head in heads], axis=1
            )

        for pack in range(t.num_packs):
            logits = self.scale * lax.dot_general(
                q_ref[pack],
                heads_side_by_side(0, pack),
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
                precision=exact,
            )
            if self.soft_cap is not None:
                logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
            logits = jnp.where(visible, logits, _MASKED)
            old_max = max_ref[pack]
            new_max = jnp.maximum(old_max, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.exp(logits - new_max[:, :1])
            rescale = jnp.exp(old_max - new_max)
            max_ref[pack] = new_max
            sum_ref[pack] = sum_ref[pack] * rescale + jnp.sum(weights, axis=1, keepdims=True)
            v = heads_side_by_side(1, pack)
            acc_ref[pack] = acc_ref[pack] * rescale[:, :1] + lax.dot_general(
                weights.astype(v.dtype),
                v,
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
                precision=exact,
            )
