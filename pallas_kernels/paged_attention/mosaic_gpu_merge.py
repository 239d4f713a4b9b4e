"""The end of decode attention on Hopper: who merges the partial results of a cut context, and how.

Every program that ends its part of a context counts itself in; the last one finds all the others'
partial results in global memory and merges them, as the last block of a reduction in one launch
does (CUDA's sample `threadFenceReduction`); the arithmetic is flash decoding's (Dao et al. 2023).
Nobody waits, and the sum runs in the order of the context, whoever comes last.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from jpaged.pallas_kernels import mosaic_gpu
from jpaged.pallas_kernels.paged_attention.mosaic_gpu_decode_schedule import (
    DecodeSchedule,
    Geometry,
)

THREADS = 128
# Where a running maximum starts, in powers of two.
MAX_START = -1e20
# Elements of a thread: of the rows that are merged at once, and of the partial results in flight.
MAX_ELEMENTS = 16
MAX_LOADED = 128
# Partial results that are loaded together or, past the end, not at all.
CHUNK = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """A context and head group that several programs share.

    Attributes:
        owner: program that has its beginning, and so a counter for it.
        parts: programs that have some of it; they follow each other.
        first_slot: where the owner's partial result lies; the others' lie at their own numbers.
    """

    owner: Int32[Array, ""]
    parts: Int32[Array, ""]
    first_slot: Int32[Array, ""]


@dataclasses.dataclass(frozen=True, slots=True)
class Merge:
    """Merges a consumer's rows: `rows` of them at a time, `unroll` partial results in flight."""

    geometry: Geometry
    rows: int
    unroll: int

    @classmethod
    def of(cls, schedule: DecodeSchedule) -> "Merge":
        """The merge of a schedule's cuts."""
        geometry = schedule.geometry
        least = _rows_at_once(geometry.head_dim)
        rows = geometry.stored_rows
        while rows % (2 * least) == 0 and rows * geometry.head_dim > MAX_ELEMENTS * THREADS:
            rows //= 2
        most = max(MAX_LOADED * THREADS // (rows * geometry.head_dim), 1)
        return cls(geometry, rows, min(most, 1 << (schedule.expected_parts - 1).bit_length()))

    def locate(self, begin, num_stages, run, num_programs) -> Cut:
        """The programs that share stages [begin, begin + num_stages), in runs of `run` stages."""
        owner = lax.div(begin, run)
        parts = lax.div(begin + num_stages - 1, run) - owner + 1
        # A program's first segment has its slot c, any other that is cut has slot `programs + c`.
        first_slot = owner + jnp.where(owner * run < begin, num_programs, 0)
        return Cut(owner, parts, first_slot)

    def arrive(self, counter_ref: Any, seen_ref: Any, cut: Cut) -> Any:
        """Counts this warpgroup in; true for the last one, which sees what the others have written.

        The counter wraps around to zero with the last arrival, ready for the next launch.
        """
        import jax.experimental.pallas.mosaic_gpu as plgpu
        from jax.experimental.mosaic.gpu import FragmentedArray, utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import memref

        scalar = plgpu.Layout.WG_SPLAT
        refs = (plgpu.RefType(), plgpu.RefType())
        result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar)

        @plgpu.inline_mgpu(arg_types=(*refs, scalar), return_type=result)
        def arrive(_, counter, seen, last):
            i32 = ir.IntegerType.get_signless(32)
            utils.warpgroup_barrier()
            with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
                before = utils.inline_ptx(
                    "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;",
                    utils.memref_ptr(counter),
                    last.registers.item(),
                    result_types=i32,
                    has_side_effects=True,
                )
                memref.store(before, seen, [])
            utils.warpgroup_barrier()
            return FragmentedArray.splat(memref.load(seen, []), (), is_signed=True)

        last = cut.parts - 1
        return arrive(counter_ref, seen_ref, last) == last

    def write(self, out_ref: Any, partial_ref: Any, stats_ref: Any, consumer, cut: Cut) -> None:
        """Writes the merged rows of a consumer to `out_ref`."""
        import jax.experimental.pallas as pl

        stored_rows = self.geometry.stored_rows
        first = consumer * stored_rows if self.geometry.shares_tile else 0
        for begin in range(0, stored_rows, self.rows):
            rows = pl.ds(first + begin, self.rows)

            def part(slot, rows=rows):
                stats = [stats_ref.at[slot, i, consumer, rows] for i in range(2)]
                return partial_ref.at[slot, consumer, rows], *stats

            self._write_rows(out_ref.at[pl.ds(begin, self.rows)], part, cut)

    def _write_rows(self, out_ref: Any, part: Callable[[Any], tuple[Any, Any, Any]], cut: Cut):
        """Writes `rows` rows; `part` gives refs to a slot's result, maxima and sums of them."""
        import jax.experimental.pallas.mosaic_gpu as plgpu

        layout = _layout(self.geometry.head_dim)
        row = layout.reduce(1)
        shape = (self.rows, self.geometry.head_dim)
        chunk = min(CHUNK, self.unroll)

        def wide(x):
            return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [0]), layout)

        def full(value, shape, layout, dtype=jnp.float32):
            return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)

        def load(i):
            exists = i < cut.parts
            # What is loaded past the end must be there too, or it might be NaN.
            slot = jnp.where((i == 0) | ~exists, cut.first_slot, cut.owner + i)
            layouts = (layout, row, row)
            acc, maximum, total = (
                plgpu.load(ref, layout=layout, optimized=False)
                for ref, layout in zip(part(slot), layouts, strict=True)
            )
            maximum = maximum + jnp.where(exists, 0.0, MAX_START)
            return acc, maximum, total * jnp.where(exists, 1.0, 0.0)

        def load_chunk(first):
            return [load(first + i) for i in range(chunk)]

        def no_chunk(_):
            acc = full(0, shape, layout, self.geometry.dtype)
            return [(acc, full(MAX_START, shape[:1], row), full(0, shape[:1], row))] * chunk

        def merge_chunk(loaded, maximum, total, acc):
            new = functools.reduce(jnp.maximum, [part[1] for part in loaded], maximum)
            scale = jnp.exp2(maximum - new)
            total, acc = total * scale, acc * wide(scale)
            for part_acc, part_maximum, part_total in loaded:
                weight = jnp.exp2(part_maximum - new) * part_total
                total, acc = total + weight, acc + part_acc.astype(jnp.float32) * wide(weight)
            return new, total, acc

        def skip_chunk(_, *carry):
            return carry

        def step(t, carry):
            # All that there is of a round is asked for before any of it is waited for.
            firsts = [t * self.unroll + begin for begin in range(0, self.unroll, chunk)]
            loaded = [load_chunk(firsts[0])]
            loaded += [lax.cond(at < cut.parts, load_chunk, no_chunk, at) for at in firsts[1:]]
            carry = merge_chunk(loaded[0], *carry)
            for at, parts in zip(firsts[1:], loaded[1:], strict=True):
                carry = lax.cond(at < cut.parts, merge_chunk, skip_chunk, parts, *carry)
            return carry

        steps = lax.div(cut.parts + (self.unroll - 1), jnp.int32(self.unroll))
        start = (full(MAX_START, shape[:1], row), full(0, shape[:1], row), full(0, shape, layout))
        _, total, acc = lax.fori_loop(0, steps, step, start)
        acc = acc * wide(1.0 / jnp.maximum(total, 1e-30))
        mosaic_gpu.store(out_ref, acc.astype(self.geometry.dtype))


def write_zeros(ref: Any, rows: int, head_dim: int, dtype: Any) -> None:
    """Writes zeros to `ref [rows, head_dim]` in global memory: rows as `stored_rows` has them."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    mosaic_gpu.store(ref, plgpu.layout_cast(jnp.zeros((rows, head_dim), dtype), _layout(head_dim)))


def write_rows(ref: Any, smem_ref: Any, rows: slice) -> None:
    """Writes rows of a tile in shared memory, 4 or 8 of them, to `ref [rows, head_dim]`."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    tile = plgpu.load(smem_ref, layout=_layout(smem_ref.shape[-1]), optimized=False)
    mosaic_gpu.store(ref, tile[rows])


def _rows_at_once(head_dim: int) -> int:
    """Rows that the four warps take at once: one each, or two where 32 threads do not divide it."""
    return 4 if head_dim % 32 == 0 else 8


def _layout(head_dim: int) -> Any:
    """Rows over warps, a row over 32 or 16 threads, each with as wide a vector as divides it."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    rows = _rows_at_once(head_dim)
    lanes = THREADS // rows
    vector = next(n for n in (8, 4, 2, 1) if head_dim % (lanes * n) == 0)
    base, last = (rows, lanes * vector), (vector,)
    if rows == 4:
        return plgpu.Layout.TILED(
            plgpu.Tiling((base, last)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )
    return plgpu.Layout.TILED(
        plgpu.Tiling((base, (2, lanes * vector), last)),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )
