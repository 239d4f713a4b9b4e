"""Merges partial results where `mosaic_gpu_decode` does not: many of few sequences.

Each partial result is normalised and comes with the maximum (in powers of two) and the sum of its
weights; merging them is the last step of flash decoding (Dao et al. 2023). The work is spread over
rows; a lone long sequence of few heads has more than a hundred partial results, which the
warpgroups of a program share out. JAX's interpreter, which has no atomic counters, takes this way
for every sequence.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jpaged.pallas_kernels.paged_attention.mosaic_gpu_decode_schedule import (
    MERGE_WIDTH,
    DecodeSchedule,
)
from jpaged.pallas_kernels.paged_attention.mosaic_gpu_merge import MAX_START

THREADS = 128
# Loads of partial results that a warpgroup keeps in flight, and warpgroups of a program, at most:
# with 8 of them a thread has 64 registers.
MAX_UNROLL = 8
MAX_WARPGROUPS = 8
# With more candidates than this, programs are plenty, and each takes several pieces of rows.
MANY_MERGES = 64


def combine(
    out_ref: Any,
    partial: Float[Array, "parts consumers padded_rows head_dim"],
    stats: Float[Array, "parts 2 consumers padded_rows"],
    schedule: DecodeSchedule,
    *,
    unroll: int | None = None,
    warpgroups: int | None = None,
    vectors: int | None = None,
    interpret: Any = None,
) -> None:
    """Writes the rows of sequences that were cut.

    Args:
        out_ref: Ref `[num_tokens, head groups, the rest]`, written in place.
        partial: From `attend_decodes`.
        stats: From `attend_decodes`.
        schedule: The one given to `attend_decodes`.
        unroll: Partial results that a warpgroup loads at once; by their expected number if None.
        warpgroups: Warpgroups of a program, which share out the partial results; idem.
        vectors: Pieces of rows a program merges one after the other; idem.
        interpret: Parameters of the interpreter on the CPU.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    assert schedule.merges is not None, "its programs merge themselves"
    num_parts, consumers, padded_rows, head_dim = partial.shape
    stored_rows = schedule.geometry.stored_rows
    rows = consumers * stored_rows
    merges = schedule.merges.shape[0] // MERGE_WIDTH
    # Rows that fill the threads evenly: one of 128 elements, two of 64, eight of 80.
    rows_a_vector = THREADS // math.gcd(head_dim, THREADS)
    width = rows_a_vector * head_dim
    total_vectors = rows // rows_a_vector
    expected = schedule.expected_parts
    unroll = unroll or min(MAX_UNROLL, _next_power(expected))
    warpgroups = warpgroups or min(MAX_WARPGROUPS, _next_power(-(-expected // unroll)))
    if vectors not in (None, 1) and warpgroups > 1:
        raise ValueError(f"several {vectors=} need one warpgroup, got {warpgroups=}")
    if vectors is None:
        most = 1 if merges <= MANY_MERGES or warpgroups > 1 else 4
        vectors = max(n for n in (1, 2, 4) if n <= most and total_vectors % n == 0)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=2 if width % (2 * THREADS) == 0 else 1)
    spread = _spreader(head_dim, rows_a_vector, layout)

    pieces = total_vectors // vectors

    def body(merges_ref, partial_ref, stats_ref, out_ref, smem, done):
        candidate, piece = lax.axis_index("merge"), lax.axis_index("piece")
        wg = lax.axis_index("wg")
        parts, token, group, first_slot, next_slot = (
            merges_ref[candidate * MERGE_WIDTH + i] for i in range(5)
        )
        share = lax.div(parts + (warpgroups - 1), jnp.int32(warpgroups))
        begin = wg * share
        end = jnp.minimum(begin + share, parts)

        def write(row, merged):
            out_ref[token, group, pl.ds(row * head_dim, width)] = merged.astype(partial.dtype)

        @pl.when(parts > 0)
        def _():
            for v in range(vectors):
                row = (piece * vectors + v) * rows_a_vector
                part_row = row
                if schedule.geometry.shares_tile:  # of which a consumer has its own rows
                    part_row += lax.div(row, jnp.int32(stored_rows)) * padded_rows
                load = functools.partial(
                    _load_part,
                    partial_ref,
                    stats_ref,
                    part_row,
                    rows_a_vector,
                    pl.ds(part_row * head_dim, width),
                    layout,
                    first_slot,
                    next_slot,
                )
                maxima, totals, acc = _merge(
                    load, begin, end, unroll, rows_a_vector, width, layout, spread
                )
                if warpgroups == 1:
                    write(row, acc * spread([1.0 / jnp.maximum(t, 1e-30) for t in totals]))
                    continue
                ones = plgpu.layout_cast(jnp.full((width,), 1, jnp.float32), layout)
                smem.at[wg, 0][...] = ones * spread(maxima)
                smem.at[wg, 1][...] = ones * spread(totals)
                smem.at[wg, 2][...] = acc
                plgpu.barrier_arrive(done)
                plgpu.barrier_wait(done)

                @pl.when(wg == 0)
                def _(row=row):
                    maxima, totals, accs = (
                        [plgpu.load(smem.at[w, i], layout=layout) for w in range(warpgroups)]
                        for i in range(3)
                    )
                    maximum = functools.reduce(jnp.maximum, maxima)
                    scales = [jnp.exp2(m - maximum) for m in maxima]
                    total = sum(t * s for t, s in zip(totals, scales, strict=True))
                    acc = sum(a * s for a, s in zip(accs, scales, strict=True))
                    write(row, acc / jnp.maximum(total, 1e-30))

    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=(
            plgpu.SMEM((warpgroups, 3, width), jnp.float32) if warpgroups > 1 else None,
            plgpu.Barrier(num_arrivals=warpgroups) if warpgroups > 1 else None,
        ),
        grid=(merges, pieces),
        grid_names=("merge", "piece"),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="paged_decode_combine",
    )(
        schedule.merges,
        partial.reshape(num_parts, -1),
        stats.reshape(num_parts, 2, -1),
        out_ref,
    )


def _next_power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _load_part(
    partial_ref, stats_ref, row, num_rows: int, columns, layout: Any, first_slot, next_slot, i, end
) -> tuple[Array, list[Array], list[Array]]:
    """Partial result i, and the maximum and sum of each of its rows; from `end` on they count 0."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    exists = i < end
    # One that is there in any case: what is loaded in vain must not be NaN.
    slot = jnp.where((i == 0) | ~exists, first_slot, next_slot + i - 1)
    vector = plgpu.load(partial_ref.at[slot, columns], layout=layout).astype(jnp.float32)
    maxima = [jnp.where(exists, stats_ref[slot, 0, row + r], MAX_START) for r in range(num_rows)]
    sums = [jnp.where(exists, stats_ref[slot, 1, row + r], 0.0) for r in range(num_rows)]
    return vector, maxima, sums


def _merge(load, begin, end, unroll: int, num_rows: int, width: int, layout: Any, spread):
    """Maxima, sums and unnormalised result of the parts in [begin, end), a few rows of them."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    def step(t, carry):
        maxima, totals, acc = carry
        loaded = [load(begin + t * unroll + u, end) for u in range(unroll)]
        new_maxima, new_totals, scales = [], [], []
        weights: list[list[Any]] = [[] for _ in loaded]
        for r in range(num_rows):
            new = functools.reduce(jnp.maximum, [part[1][r] for part in loaded], maxima[r])
            scales.append(jnp.exp2(maxima[r] - new))
            total = totals[r] * scales[r]
            for weight, (_, part_maxima, part_sums) in zip(weights, loaded, strict=True):
                weight.append(jnp.exp2(part_maxima[r] - new) * part_sums[r])
                total = total + weight[-1]
            new_maxima.append(new)
            new_totals.append(total)
        acc = acc * spread(scales)
        for weight, (vector, _, _) in zip(weights, loaded, strict=True):
            acc = acc + vector * spread(weight)
        return tuple(new_maxima), tuple(new_totals), acc

    start = (
        (jnp.float32(MAX_START),) * num_rows,
        (jnp.float32(0),) * num_rows,
        plgpu.layout_cast(jnp.full((width,), 0, jnp.float32), layout),
    )
    steps = lax.div(jnp.maximum(end - begin, 0) + (unroll - 1), jnp.int32(unroll))
    return lax.fori_loop(0, steps, step, start)


def _spreader(head_dim: int, rows_a_vector: int, layout: Any) -> Callable[[Sequence[Any]], Any]:
    """What turns one scalar a row into a factor of the rows' elements."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    def spread(values: Sequence[Any]) -> Any:
        if rows_a_vector == 1:
            return values[0]
        shape = (rows_a_vector * head_dim,)
        element = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
        row = lax.div(element, jnp.int32(head_dim))
        vector = values[0]
        for r in range(1, rows_a_vector):
            vector = jnp.where(row == r, values[r], vector)
        return vector

    return spread
