"""Decode attention on Hopper: one query row a sequence, the context split evenly over the chip.

The context of all sequences is laid end to end and cut into as many equal runs as there are
multiprocessors (stream-K, Osama et al. 2023): perfect balance for ragged batches without choosing a
split. A persistent program walks its run: a producer warp brings K and V of a few slots of *all* kv
heads of a group into a ring of shared-memory stages by TMA; each consumer warpgroup multiplies its
64 rows (heads x slots) with the query heads of the sequence and masks what does not belong together
(another head's rows, slots past the end). wgmma has 64 rows of queries anyway, so the masked
products cost nothing that was not already paid. A sequence that lies in one run is written at once;
of one that is cut, every run writes a normalised partial result, and the last run to end merges
them (`mosaic_gpu_merge`), or, where many are expected, a kernel of its own (`mosaic_gpu_combine`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jpaged.pallas_kernels import mosaic_gpu
from jpaged.pallas_kernels.paged_attention.mosaic_gpu_decode_schedule import (
    INFO_WIDTH,
    META_FIELDS,
    META_WIDTH,
    ROWS,
    DecodeSchedule,
    Geometry,
)
from jpaged.pallas_kernels.paged_attention.mosaic_gpu_merge import (
    MAX_START,
    Merge,
    write_rows,
    write_zeros,
)

LOG2E = math.log2(math.e)
# A masked score must stay far below the start of the running maximum: with equal numbers the fused
# multiply-add of `exp2(s * scale - max)` leaves a rounding residue large enough to overflow.
MASKED = -1e30


def attend_decodes(
    q: Float[Array, "num_tokens num_heads head_dim"],
    pool: Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"],
    block_tables: Int32[Array, "num_seqs max_blocks"],
    schedule: DecodeSchedule,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    out_ref: Any = None,
    interpret: Any = None,
) -> tuple[Array | None, Array, Array]:
    """Attention of the sequences with one query; zeros in rows of padding.

    Where the schedule has `merges`, the rows of cut sequences are left to `combine`.

    Args:
        q: As `paged_attention`.
        pool: As `paged_attention`.
        block_tables: As `paged_attention`.
        schedule: From `make_schedule` for these tables, lengths and window.
        scale: Factor of the logits.
        sliding_window: As `paged_attention`.
        soft_cap: As `paged_attention`.
        out_ref: A ref like the first result to write to, instead of an array whose other rows are
            undefined.
        interpret: Parameters of the interpreter on the CPU.

    Returns:
        The output `[num_tokens, tiles, stored_rows, head_dim]` (or None with `out_ref`), the
        partial results `[parts, consumers, padded_rows, head_dim]` and their running maximum
        (in powers of two) and sum `[parts, 2, consumers, padded_rows]`.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    geometry = schedule.geometry
    stored = stored_queries(q, geometry)
    programs = schedule.programs.shape[0] // META_WIDTH
    W, D, rows, dtype = (
        geometry.consumers,
        geometry.head_dim,
        geometry.padded_rows,
        geometry.dtype,
    )
    merge = None if schedule.merges is not None else Merge.of(schedule)
    transforms = mosaic_gpu.tile_transforms(D, dtype)
    kv_smem = plgpu.SMEM((geometry.stages, W * ROWS, D), dtype, transforms=transforms)
    square = mosaic_gpu.tile_transforms(ROWS, dtype)
    boxes = _boxes_per_stage(geometry)
    body = functools.partial(
        _decode_kernel,
        geometry=geometry,
        merge=merge,
        max_blocks=block_tables.shape[1],
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        interpreted=interpret is not None,
    )

    def entry(*refs):
        # The output is an argument where the caller brings it, and the first result otherwise.
        def scoped(*scratch):
            body(*refs, scratch)

        pl.run_scoped(
            scoped,
            plgpu.SMEM((2, W, ROWS, D), dtype, transforms=transforms),
            kv_smem,
            kv_smem,
            plgpu.SMEM((2, W, 2, ROWS), jnp.float32),
            plgpu.SMEM((W, ROWS, ROWS), dtype, transforms=square)
            if interpret is not None
            else None,
            plgpu.SMEM((W,), jnp.int32),
            plgpu.Barrier(num_barriers=2 * W),
            plgpu.Barrier(num_arrivals=boxes, num_barriers=geometry.stages),
            plgpu.Barrier(num_arrivals=boxes, num_barriers=geometry.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=geometry.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=geometry.stages),
            collective_axes="wg",
        )

    parts = 2 * programs
    out_types = (
        jax.ShapeDtypeStruct(stored.shape, dtype),
        jax.ShapeDtypeStruct((parts, W, rows, D), dtype),
        jax.ShapeDtypeStruct((parts, 2, W, rows), jnp.float32),
    )
    call = plgpu.kernel(
        entry,
        out_type=out_types if out_ref is None else out_types[1:],
        grid=(programs,),
        grid_names=("program",),
        num_threads=W + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        interpret=interpret,
        kernel_name="paged_decode",
    )
    args = (
        schedule.programs,
        schedule.seqs,
        schedule.sizes,
        schedule.arrivals,
        block_tables.reshape(-1),
        stored.reshape(stored.shape[0], -1, rows, D),
        _as_boxes(pool, geometry),
    )
    if out_ref is None:
        out, partial, stats = call(*args)
        return out, partial, stats
    partial, stats = call(*args, out_ref)
    return None, partial, stats


def stored_queries(
    q: Float[Array, "num_tokens num_heads head_dim"], geometry: Geometry
) -> Float[Array, "num_tokens tiles stored_rows head_dim"]:
    """Queries by consumer tile; free where these need no more rows than there are heads."""
    tiles = geometry.num_kv_heads // geometry.heads
    q = q.reshape(q.shape[0], tiles, geometry.query_rows, q.shape[2])
    return jnp.pad(q, ((0, 0), (0, 0), (0, geometry.stored_rows - geometry.query_rows), (0, 0)))


def _as_boxes(pool, geometry):
    """The pool as the rows that one TMA box is taken from."""
    num_blocks, _, num_kv_heads, block_size, head_dim = pool.shape
    if geometry.block_size > geometry.slots:
        return pool.reshape(num_blocks * 2 * num_kv_heads, block_size, head_dim)
    return pool.reshape(num_blocks * 2, num_kv_heads * block_size, head_dim)


def _boxes_per_stage(geometry: Geometry) -> int:
    if geometry.block_size > geometry.slots:
        return geometry.consumers * geometry.heads
    return 1 if geometry.blocks == 1 else geometry.blocks * geometry.consumers


def _decode_kernel(
    meta_ref,
    info_ref,
    sizes_ref,
    arrivals_ref,
    tables_ref,
    q_ref,
    pool_ref,
    out_ref,
    partial_ref,
    stats_ref,
    scratch,
    *,
    geometry: Geometry,
    merge: Merge | None,
    max_blocks: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    interpreted: bool,
):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    q_smem2, k_smem, v_smem, stats_smem2, p_smem, seen_smem, *barriers = scratch
    q_ready, k_ready, v_ready, k_free, v_free = barriers
    W, stages, slots = geometry.consumers, geometry.stages, geometry.slots
    D, rows, stored_rows, groups, dtype = (
        geometry.head_dim,
        geometry.padded_rows,
        geometry.stored_rows,
        geometry.head_groups,
        geometry.dtype,
    )
    f32, i32 = jnp.float32, jnp.int32
    program, wg = lax.axis_index("program"), lax.axis_index("wg")
    num_programs = lax.axis_size("program")
    num_seqs = info_ref.shape[0] // INFO_WIDTH - 1

    def meta(i):
        return meta_ref[program * META_WIDTH + i]

    def info(seq, i):
        return info_ref[seq * INFO_WIDTH + i]

    def advance(seq, group):
        """The unit after this one: the next head group, or the next sequence."""
        next_seq = jnp.minimum(seq + 1, num_seqs)
        if groups == 1:
            return next_seq, group
        wraps = group + 1 == groups
        return jnp.where(wraps, next_seq, seq), jnp.where(wraps, 0, group + 1)

    def stage_end(length):
        return lax.div(length + (slots - 1), i32(slots))

    @pl.when(wg < W)
    def _consumer():
        plgpu.set_max_registers(240 if W == 1 else 216, action="increase")
        row = plgpu.Layout.WGMMA.reduce(1)
        q_row = plgpu.broadcasted_iota(i32, (ROWS, ROWS), 0, layout=plgpu.Layout.WGMMA)
        kv_row = plgpu.broadcasted_iota(i32, (ROWS, ROWS), 1, layout=plgpu.Layout.WGMMA)
        run = min(geometry.block_size, slots)  # rows of one head that lie together
        kv_head = lax.rem(lax.div(kv_row, i32(run)), i32(geometry.heads))
        slot_in_stage = lax.rem(kv_row, i32(run))
        if geometry.blocks > 1:
            slot_in_stage += lax.div(kv_row, i32(run * geometry.heads)) * run
        if geometry.shares_tile:
            kv_head += wg * geometry.heads
        same_head = lax.div(q_row, i32(geometry.group_size)) == kv_head

        def start_q(buffer, token, group):
            tile = group if geometry.shares_tile else group * W + wg
            plgpu.copy_gmem_to_smem(
                q_ref.at[token, tile],
                q_smem2.at[buffer, wg, pl.ds(0, rows)],
                q_ready.at[buffer * W + wg],
            )

        num_segments = meta(1)

        def count_in(seq, group, token, length, first):
            """Says that a part of a cut context is there; merges all parts after the last one."""
            num_stages = stage_end(length) - first
            begin = info(seq, 4) + group * num_stages
            cut = merge.locate(begin, num_stages, sizes_ref[1], num_programs)
            is_last = merge.arrive(arrivals_ref.at[cut.owner * W + wg], seen_smem.at[wg], cut)

            @pl.when(is_last)
            def _():
                merge.write(out_ref.at[token, group * W + wg], partial_ref, stats_ref, wg, cut)

        def segment(k, carry):
            done, left, seq, group, stage, token, length, first = carry
            buffer = lax.rem(k, i32(2))
            count = jnp.minimum(left, stage_end(length) - stage)
            next_seq, next_group = advance(seq, group)
            following = tuple(info(next_seq, i) for i in (1, 2, 3))
            q_smem = q_smem2.at[buffer, wg]
            plgpu.barrier_wait(q_ready.at[buffer * W + wg])

            @pl.when(k + 1 < num_segments)
            def _():
                # The other buffer was the last segment's output stage.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                start_q(1 - buffer, following[0], next_group)

            maximum = plgpu.layout_cast(jnp.full((ROWS,), MAX_START, f32), row)
            total = plgpu.layout_cast(jnp.full((ROWS,), 0, f32), row)
            acc = plgpu.layout_cast(jnp.full((ROWS, D), 0, f32), plgpu.Layout.WGMMA)

            def step(j, carry):
                done, acc, maximum, total = carry
                at = lax.rem(done, i32(stages))
                k_tile = k_smem.at[at, pl.ds(wg * ROWS, ROWS)]
                v_tile = v_smem.at[at, pl.ds(wg * ROWS, ROWS)]
                plgpu.barrier_wait(k_ready.at[at])

                def scores(ref):
                    plgpu.wgmma(ref, q_smem, k_tile.transpose((1, 0)))
                    return ref[...]

                s = pl.run_scoped(scores, plgpu.ACC((ROWS, ROWS), f32))
                plgpu.barrier_arrive(k_free.at[at])
                factor = scale * LOG2E
                if soft_cap is not None:
                    # tanh(x) = 1 - 2 / (1 + exp(2 x))
                    e = jnp.exp2(s * (2 * LOG2E * scale / soft_cap))
                    s, factor = soft_cap - (2 * soft_cap) / (1 + e), LOG2E
                remaining = length - (stage + j) * slots
                visible = same_head & (slot_in_stage < remaining)
                if sliding_window is not None:
                    visible &= slot_in_stage >= remaining - sliding_window
                s = jnp.where(visible, s, MASKED)
                new_maximum = jnp.maximum(maximum, s.max(axis=1) * factor)
                rescale = jnp.exp2(maximum - new_maximum)
                p = jnp.exp2(s * factor - lax.broadcast_in_dim(new_maximum, s.shape, [0]))
                total = total * rescale + p.sum(axis=1)
                acc = acc * lax.broadcast_in_dim(rescale, acc.shape, [0])
                p = p.astype(dtype)
                plgpu.barrier_wait(v_ready.at[at])

                # Slots past the end may hold NaN, and 0 x NaN is NaN.
                @pl.when(remaining < slots)
                def _():
                    wide = (ROWS, D)
                    kv = plgpu.broadcasted_iota(i32, wide, 0, layout=plgpu.Layout.WGMMA)
                    slot = lax.rem(kv, i32(run))
                    if geometry.blocks > 1:
                        slot += lax.div(kv, i32(run * geometry.heads)) * run
                    v = plgpu.load(v_tile, layout=plgpu.Layout.WGMMA, optimized=False)
                    v_tile[...] = jnp.where(slot < remaining, v, jnp.zeros_like(v))
                    plgpu.commit_smem()

                if interpreted:  # its wgmma takes shared memory only, and starts from zero
                    p_smem.at[wg][...] = p
                    plgpu.commit_smem()

                    def weighted(ref):
                        plgpu.wgmma(ref, p_smem.at[wg], v_tile)
                        return ref[...]

                    acc = acc + pl.run_scoped(weighted, plgpu.ACC((ROWS, D), f32))
                else:
                    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, v_tile))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[at])
                return done + 1, acc, new_maximum, total

            done, acc, maximum, total = lax.fori_loop(0, count, step, (done, acc, maximum, total))
            acc = acc * lax.broadcast_in_dim(1.0 / jnp.maximum(total, 1e-30), acc.shape, [0])
            q_smem[...] = acc.astype(dtype)
            is_whole = (stage == first) & (stage + count == stage_end(length))
            stats_smem = stats_smem2.at[buffer, wg]
            stats_smem.at[0][...] = maximum
            stats_smem.at[1][...] = total
            plgpu.commit_smem()

            @pl.when(is_whole)
            def _():
                to = out_ref.at[token, group * W + wg]
                if geometry.shares_tile:
                    for w in range(W):
                        own = slice(w * stored_rows, (w + 1) * stored_rows)
                        pl.when(wg == w)(
                            functools.partial(write_rows, to, q_smem.at[pl.ds(0, rows)], own)
                        )
                else:
                    plgpu.copy_smem_to_gmem(q_smem.at[pl.ds(0, rows)], to)

            @pl.when(jnp.logical_not(is_whole))
            def _():
                part = program + jnp.where(k == 0, 0, num_programs)
                plgpu.copy_smem_to_gmem(q_smem.at[pl.ds(0, rows)], partial_ref.at[part, wg])
                for i in range(2):
                    plgpu.copy_smem_to_gmem(
                        stats_smem.at[i, pl.ds(0, rows)], stats_ref.at[part, i, wg]
                    )
                if merge is not None:
                    plgpu.wait_smem_to_gmem(0)
                    count_in(seq, group, token, length, first)

            next_stage = following[2]
            if groups > 1:
                next_stage = jnp.where(next_seq == seq, first, next_stage)
            return (done, left - count, next_seq, next_group, next_stage, *following)

        seq, group = meta(2), meta(3)
        mine = (meta(5), meta(6), meta(7))

        @pl.when(num_segments > 0)
        def _():
            start_q(0, mine[0], group)

        lax.fori_loop(0, num_segments, segment, (i32(0), meta(0), seq, group, meta(4), *mine))

        @pl.loop(sizes_ref[0] + program, out_ref.shape[0], step=num_programs)
        def _(token):
            for tile in range(groups):
                write_zeros(out_ref.at[token, tile * W + wg], stored_rows, D, dtype)

        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == W)
    def _producer():
        plgpu.set_max_registers(40, action="decrease")
        count = meta(0)

        def load(at, group, stage, ids, which):
            smem, ready = ((k_smem, k_ready), (v_smem, v_ready))[which]
            for box in _boxes(geometry, group, stage, ids, which):
                plgpu.copy_gmem_to_smem(
                    pool_ref.at[box.index, pl.ds(box.row, box.rows)],
                    smem.at[at, pl.ds(box.to, box.rows)],
                    ready.at[at],
                )

        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                def block_ids(row, stage):
                    at = lax.div(stage * slots, i32(geometry.block_size))
                    return tuple(
                        tables_ref[row * max_blocks + jnp.minimum(at + i, max_blocks - 1)]
                        for i in range(geometry.blocks)
                    )

                def following(seq, group, stage, end, row):
                    """Place of the stage after this one, and what its sequence says."""

                    def move():
                        new_seq, new_group = advance(seq, group)
                        length = info(new_seq, 2)
                        return (
                            new_seq,
                            new_group,
                            info(new_seq, 3),
                            stage_end(length),
                            info(new_seq, 0),
                        )

                    return lax.cond(
                        stage + 1 < end, lambda: (seq, group, stage + 1, end, row), move
                    )

                seq = meta(2)
                place = (seq, meta(3), meta(4), stage_end(meta(6)), info(seq, 0))
                for i in range(stages):
                    first_ids = tuple(
                        meta(META_FIELDS + i * geometry.blocks + b) for b in range(geometry.blocks)
                    )

                    @pl.when(i < count)
                    def _(i=i, place=place, first_ids=first_ids):
                        load(i, place[1], place[2], first_ids, 0)
                        load(i, place[1], place[2], first_ids, 1)

                    place = following(*place)

                def body(i, carry):
                    place, ids = carry
                    at = lax.rem(i, i32(stages))
                    after = following(*place)
                    # Read one stage ahead, so that the latency is hidden.
                    next_ids = block_ids(after[4], after[2])
                    plgpu.barrier_wait(k_free.at[at])
                    load(at, place[1], place[2], ids, 0)
                    plgpu.barrier_wait(v_free.at[at])
                    load(at, place[1], place[2], ids, 1)
                    return after, next_ids

                lax.fori_loop(stages, count, body, (place, block_ids(place[4], place[2])))

                if interpreted:  # it wants every phase of a barrier to be seen

                    def drain(i, _):
                        at = lax.rem(i, i32(stages))
                        plgpu.barrier_wait(k_free.at[at])
                        plgpu.barrier_wait(v_free.at[at])

                    lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Box:
    """One TMA copy of a stage: rows of the pool, and where they go."""

    index: Any
    row: Any
    rows: int
    to: int


def _boxes(geometry: Geometry, group, stage, ids, which: int) -> list[_Box]:
    """The copies that fill one stage with K (`which` 0) or V (1)."""
    W, heads, slots = geometry.consumers, geometry.heads, geometry.slots
    size, num_kv_heads = geometry.block_size, geometry.num_kv_heads
    first_head = 0 if geometry.head_groups == 1 else group * (W * heads)
    if size > slots:  # a part of one block: the slots of each head lie apart
        # Written as a product, so that its alignment is seen.
        offset = lax.rem(stage, jnp.int32(size // slots)) * slots
        index = (ids[0] * 2 + which) * num_kv_heads + first_head
        return [_Box(index + h, offset, slots, h * slots) for h in range(W * heads)]
    first_row = 0 if geometry.head_groups == 1 else group * (W * heads * size)
    if geometry.blocks == 1:
        return [_Box(ids[0] * 2 + which, first_row, W * ROWS, 0)]
    return [
        _Box(
            block_id * 2 + which,
            first_row + w * heads * size,
            heads * size,
            w * ROWS + b * heads * size,
        )
        for b, block_id in enumerate(ids)
        for w in range(W)
    ]
