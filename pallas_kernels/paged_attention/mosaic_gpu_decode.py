"""Decode attention on Hopper: one query row a sequence, the context split evenly over the chip.

The context of all sequences is laid end to end and cut into as many equal runs as there are
multiprocessors (stream-K, Osama et al. 2023): perfect balance for ragged batches without choosing a
split. A persistent program walks its run: a producer warp brings K and V of a few slots of *all* kv
heads of a group into a ring of shared-memory stages by TMA; each consumer warpgroup multiplies its
64 rows (heads x slots) with the query heads of the sequence and masks what does not belong together
(another head's rows, slots past the end). wgmma has 64 rows of queries anyway, so the masked
products cost nothing that was not already paid. A sequence that lies in one run is written at once;
of one that is cut, every run writes a normalised partial result, which `mosaic_gpu_combine` merges.
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

LOG2E = math.log2(math.e)
# A masked score must stay far below the start of the running maximum: with equal numbers the fused
# multiply-add of `exp2(s * scale - max)` leaves a rounding residue large enough to overflow.
MASKED = -1e30
MAX_START = -1e20
# Rows of a wgmma tile.
ROWS = 64
# Ints of a program's row in the schedule: 8 fields, then the first block ids.
META_WIDTH = 32
META_FIELDS = 8
# Ints of a sequence's row: row of its block table, token, context length, first stage of context.
INFO_WIDTH = 4
# Ints of a merge: number of partial results, token, head group, first slot, second slot.
MERGE_WIDTH = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How heads and slots are laid over tiles.

    Attributes:
        num_kv_heads: kv heads of the pool.
        group_size: query heads a kv head.
        head_dim: elements of a head.
        block_size: slots of a block.
        dtype: of queries and pool.
        consumers: warpgroups that compute, each with its own kv heads.
        heads: kv heads of one consumer's tile.
        stages: depth of the ring.
    """

    num_kv_heads: int
    group_size: int
    head_dim: int
    block_size: int
    dtype: Any
    consumers: int
    heads: int
    stages: int

    @property
    def slots(self) -> int:
        """Context slots of one stage."""
        return ROWS // self.heads

    @property
    def blocks(self) -> int:
        """Blocks that one stage reads from, whole ones or a part of one."""
        return max(self.slots // self.block_size, 1)

    @property
    def head_groups(self) -> int:
        """Groups of kv heads that are walked one after the other."""
        return self.num_kv_heads // (self.consumers * self.heads)

    @property
    def query_rows(self) -> int:
        """Query heads of one consumer."""
        return self.heads * self.group_size

    @property
    def padded_rows(self) -> int:
        """The same, in whole shared-memory tiles."""
        return -(-self.query_rows // 8) * 8

    @property
    def stage_bytes(self) -> int:
        """Bytes of K and V of one stage."""
        return 2 * self.consumers * ROWS * self.head_dim * jnp.dtype(self.dtype).itemsize


def choose_geometry(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: jax.typing.DTypeLike,
    *,
    stages: int | None = None,
) -> Geometry:
    """The geometry for a model's heads.

    Consumers split the kv heads, never the context, so that none of them needs another's result. Of
    a head dim above 128 one consumer's tile is as large as two others'.
    """
    consumers = 2 if num_kv_heads % 2 == 0 and head_dim <= 128 else 1
    group_size = num_heads // num_kv_heads
    heads = next(
        n
        for n in (4, 2, 1)
        if num_kv_heads // consumers % n == 0 and (n * group_size <= ROWS or n == 1)
    )
    geometry = Geometry(
        num_kv_heads=num_kv_heads,
        group_size=group_size,
        head_dim=head_dim,
        block_size=block_size,
        dtype=jnp.dtype(dtype),
        consumers=consumers,
        heads=heads,
        stages=2,
    )
    # 128 KB in flight on every multiprocessor are enough for the full bandwidth; more only costs.
    if stages is None:
        stages = min(max(2, (128 * 1024) // geometry.stage_bytes), 8)
        stages = min(stages, (META_WIDTH - META_FIELDS) // geometry.blocks)
    return dataclasses.replace(geometry, stages=stages)


def unsupported_reasons(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: jax.typing.DTypeLike,
) -> list[str]:
    """Why the kernel cannot serve a problem; empty if it can."""
    reasons = []
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"dtype must be bfloat16 or float16, got {jnp.dtype(dtype)}")
    if head_dim not in (64, 80, 96, 128, 256):
        reasons.append(f"head_dim must be 64, 80, 96, 128 or 256, got {head_dim}")
    if block_size < 16:
        reasons.append(f"block_size must be at least 16, got {block_size}")
    if not reasons:
        geometry = choose_geometry(num_heads, num_kv_heads, head_dim, block_size, dtype)
        if geometry.padded_rows > ROWS:
            reasons.append(
                f"a tile of {ROWS} rows must hold the query heads of {geometry.heads} kv heads, "
                f"got {geometry.query_rows}"
            )
    return reasons


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["programs", "seqs", "merges", "num_tokens"],
    meta_fields=["geometry"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSchedule:
    """Who walks which part of the context; the same for all layers of a step.

    Attributes:
        programs: a row a program, with all that its first loads need: stages to walk, parts of
            sequences (segments) among them, index of the first sequence, its head group, the stage
            it starts at, its token, length and first stage, and the first block ids.
        seqs: a row a decoding sequence: its row in the block tables, its token, its context length
            and the first stage of its context (0 without a sliding window).
        merges: a row a sequence and head group that may have been cut.
        num_tokens: tokens of the batch that belong to a sequence.
        geometry: static.
    """

    programs: Int32[Array, " programs_x_META_WIDTH"]
    seqs: Int32[Array, " seqs_x_INFO_WIDTH"]
    merges: Int32[Array, " merges_x_MERGE_WIDTH"]
    num_tokens: Int32[Array, " 1"]
    geometry: Geometry


def make_schedule(
    block_tables: Int32[Array, "num_seqs max_blocks"],
    seq_lens: Int32[Array, " num_seqs"],
    query_start_loc: Int32[Array, " num_seqs_plus_1"],
    geometry: Geometry,
    *,
    sliding_window: int | None = None,
    num_programs: int | None = None,
    min_stages: int = 2,
) -> DecodeSchedule:
    """The schedule of a step, in a few small XLA kernels.

    Args:
        block_tables: As `paged_attention`.
        seq_lens: As `paged_attention`.
        query_start_loc: As `paged_attention`.
        geometry: From `choose_geometry`.
        sliding_window: As `paged_attention`.
        num_programs: Programs to launch; one a multiprocessor if None.
        min_stages: The fewest stages worth a program of its own.
    """
    programs = num_programs or mosaic_gpu.num_sms()
    slots, groups = geometry.slots, geometry.head_groups
    num_seqs = block_tables.shape[0]
    lens = jnp.where(query_start_loc[1:] - query_start_loc[:-1] == 1, seq_lens, 0)
    # Decodes first, in order, and nothing between them.
    rank = jnp.cumsum(lens > 0)
    index = jnp.arange(num_seqs, dtype=jnp.int32)
    table_row = (rank[None, :] <= index[:, None]).sum(-1, dtype=jnp.int32)
    table_row = jnp.minimum(table_row, num_seqs - 1)
    token = query_start_loc[table_row]
    lens = jnp.where(index < rank[-1], lens[table_row], 0)
    last = -(-lens // slots)
    first = jnp.zeros_like(lens)
    if sliding_window is not None:
        first = jnp.maximum(lens - sliding_window, 0) // slots
    length = last - first  # stages of each sequence and head group
    end = jnp.cumsum(length * groups)
    start = end - length * groups
    total = end[-1]

    c = jnp.arange(programs + 1, dtype=jnp.int32)
    # Whole stages a program: the longest run is not longer for it, and there are fewer cuts.
    cut = jnp.minimum(c * jnp.maximum(-(-total // programs), min_stages), total)

    def place(position):
        """Sequence, head group and stage at each position of the laid out context."""
        seq = (end <= position[..., None]).sum(-1, dtype=jnp.int32)
        seq = jnp.minimum(seq, num_seqs - 1)
        within = position - start[seq]
        stages = jnp.maximum(length[seq], 1)
        return seq, within // stages, first[seq] + within % stages

    count = cut[1:] - cut[:-1]
    seq, group, stage = place(cut[:-1])
    last_seq, last_group, _ = place(cut[1:] - 1)
    segments = (last_seq - seq) * groups + last_group - group + 1
    segments = jnp.where(count > 0, segments, 0)
    ahead = cut[:-1, None] + jnp.arange(geometry.stages, dtype=jnp.int32)
    ids = _block_ids(block_tables, table_row, *place(ahead)[::2], geometry)
    fields = [count, segments, seq, group, stage, token[seq], lens[seq], first[seq]]
    meta = jnp.concatenate([jnp.stack(fields, 1), ids.reshape(programs, -1)], axis=1)
    meta = jnp.pad(meta, ((0, 0), (0, META_WIDTH - meta.shape[1])))
    info = jnp.stack([table_row, token, lens, first], 1)

    by_unit = num_seqs * groups < programs or programs == 1
    if by_unit:  # a candidate is a sequence and head group
        unit = jnp.arange(num_seqs * groups, dtype=jnp.int32)
        begin = start[unit // groups] + unit % groups * length[unit // groups]
    else:  # a candidate is a cut; it merges if it is the first one inside its sequence
        inside, inside_group, inside_stage = place(cut[1:-1])
        unit = inside * groups + inside_group
        begin = cut[1:-1] - (inside_stage - first[inside])
    unit_seq, unit_group = unit // groups, unit % groups
    stop = begin + length[unit_seq]
    # Programs whose run begins inside the unit, its own beginning aside.
    first_inside = (cut[:-1] <= begin[:, None]).sum(-1, dtype=jnp.int32)
    num_inside = (cut[:-1] < stop[:, None]).sum(-1, dtype=jnp.int32) - first_inside
    owner = first_inside - 1
    parts = jnp.where(num_inside > 0, num_inside + 1, 0)
    if not by_unit:
        c = jnp.arange(1, programs, dtype=jnp.int32)
        parts = jnp.where((first_inside == c) & (cut[1:-1] > begin), parts, 0)
    # A program's first segment has its slot c, any other that is cut has slot `programs + c`.
    slot = owner + jnp.where(cut[jnp.maximum(owner, 0)] < begin, programs, 0)
    none = jnp.zeros_like(parts)
    merges = jnp.stack(
        [parts, token[unit_seq], unit_group, slot, first_inside, none, none, none], 1
    )
    return DecodeSchedule(
        programs=meta.reshape(-1),
        seqs=jnp.pad(info.reshape(-1), (0, INFO_WIDTH)),
        merges=merges.reshape(-1),
        num_tokens=query_start_loc[-1:],
        geometry=geometry,
    )


def _block_ids(block_tables, table_row, seq, stage, geometry):
    """Ids of the blocks of a stage, `[..., blocks]`; the last one again past a table's end."""
    at = stage[..., None] * geometry.slots // geometry.block_size
    at = at + jnp.arange(geometry.blocks, dtype=jnp.int32)
    at = jnp.minimum(at, block_tables.shape[1] - 1)
    return block_tables[table_row[seq][..., None], at]


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
) -> tuple[Array, Array, Array]:
    """Attention of the sequences with one query, before cut ones are merged.

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
        The output `[num_tokens, tiles, padded_rows, head_dim]` (or None with `out_ref`), the
        partial results `[parts, consumers, padded_rows, head_dim]` and their running maximum
        (in powers of two) and sum `[parts, 2, consumers, padded_rows]`.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    geometry = schedule.geometry
    num_tokens = q.shape[0]
    padded = pad_queries(q, geometry)
    programs = schedule.programs.shape[0] // META_WIDTH
    W, D, rows, dtype = (
        geometry.consumers,
        geometry.head_dim,
        geometry.padded_rows,
        geometry.dtype,
    )
    transforms = mosaic_gpu.tile_transforms(D, dtype)
    kv_smem = plgpu.SMEM((geometry.stages, W * ROWS, D), dtype, transforms=transforms)
    square = mosaic_gpu.tile_transforms(ROWS, dtype)
    boxes = _boxes_per_stage(geometry)
    body = functools.partial(
        _decode_kernel,
        geometry=geometry,
        max_blocks=block_tables.shape[1],
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        interpreted=interpret is not None,
    )

    def entry(meta_ref, info_ref, tables_ref, q_ref, pool_ref, *outputs):
        # The output is an argument where the caller brings it, and the first result otherwise.
        def scoped(*scratch):
            body(meta_ref, info_ref, tables_ref, q_ref, pool_ref, *outputs, scratch)

        pl.run_scoped(
            scoped,
            plgpu.SMEM((2, W, ROWS, D), dtype, transforms=transforms),
            kv_smem,
            kv_smem,
            plgpu.SMEM((2, W, 2, ROWS), jnp.float32),
            plgpu.SMEM((W, ROWS, ROWS), dtype, transforms=square)
            if interpret is not None
            else None,
            plgpu.Barrier(num_barriers=2 * W),
            plgpu.Barrier(num_arrivals=boxes, num_barriers=geometry.stages),
            plgpu.Barrier(num_arrivals=boxes, num_barriers=geometry.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=geometry.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=geometry.stages),
            collective_axes="wg",
        )

    parts = 2 * programs
    out_types = (
        jax.ShapeDtypeStruct((num_tokens, padded.shape[1], rows, D), dtype),
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
        block_tables.reshape(-1),
        padded,
        _as_boxes(pool, geometry),
    )
    if out_ref is None:
        out, partial, stats = call(*args)
        return out, partial, stats
    partial, stats = call(*args, out_ref)
    return None, partial, stats


def pad_queries(
    q: Float[Array, "num_tokens num_heads head_dim"], geometry: Geometry
) -> Float[Array, "num_tokens tiles padded_rows head_dim"]:
    """Queries by consumer tile, rows filled up; free where the heads fill whole tiles."""
    tiles = geometry.num_kv_heads // geometry.heads
    q = q.reshape(q.shape[0], tiles, geometry.query_rows, q.shape[2])
    return jnp.pad(q, ((0, 0), (0, 0), (0, geometry.padded_rows - geometry.query_rows), (0, 0)))


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
    tables_ref,
    q_ref,
    pool_ref,
    out_ref,
    partial_ref,
    stats_ref,
    scratch,
    *,
    geometry: Geometry,
    max_blocks: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    interpreted: bool,
):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    q_smem2, k_smem, v_smem, stats_smem2, p_smem, q_ready, k_ready, v_ready, k_free, v_free = (
        scratch
    )
    W, stages, slots = geometry.consumers, geometry.stages, geometry.slots
    D, rows, groups, dtype = (
        geometry.head_dim,
        geometry.padded_rows,
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
        same_head = lax.div(q_row, i32(geometry.group_size)) == kv_head

        def start_q(buffer, token, group):
            plgpu.copy_gmem_to_smem(
                q_ref.at[token, group * W + wg],
                q_smem2.at[buffer, wg, pl.ds(0, rows)],
                q_ready.at[buffer * W + wg],
            )

        num_segments = meta(1)

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
                plgpu.copy_smem_to_gmem(
                    q_smem.at[pl.ds(0, rows)], out_ref.at[token, group * W + wg]
                )

            @pl.when(jnp.logical_not(is_whole))
            def _():
                part = program + jnp.where(k == 0, 0, num_programs)
                plgpu.copy_smem_to_gmem(q_smem.at[pl.ds(0, rows)], partial_ref.at[part, wg])
                for i in range(2):
                    plgpu.copy_smem_to_gmem(
                        stats_smem.at[i, pl.ds(0, rows)], stats_ref.at[part, i, wg]
                    )

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
