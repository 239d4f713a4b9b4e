"""Rows times a large weight on Hopper: a ring of TMA copies that feeds wgmma.

A decode step multiplies 1 to 256 rows by every weight of the model once, so the time is that of
reading the weights; a kernel is as fast as the bytes it keeps in flight on every multiprocessor.
One program owns a tile of output columns and a part of the depth (split-K, so that one wave of
programs covers the chip however narrow the weight is). One warp copies `[tile_k, tile_n]` pieces of
the weight and the matching columns of `x` into as many stages as shared memory holds; consumer
warpgroups multiply them into float32 accumulators. After "Dissecting the NVIDIA Hopper Architecture
through Microbenchmarking" (bytes in flight), Stream-K (arXiv 2301.03598, why split) and CUTLASS'
warp-specialised persistent kernels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jpaged.pallas_kernels import mosaic_gpu
from jpaged.pallas_kernels.linear.api import Activation

MAX_ROWS = 1024
# With the activation many rows are served as well: XLA computes it in a pass of its own.
MAX_ACTIVATION_ROWS = 64 * 1024
# Rows of one wgmma; fewer rows cost the same tensor time, which few rows have to spare.
WGMMA_ROWS = 64
# Bytes of a row of a staging tile: the widest swizzle, so stores to it meet no bank conflicts.
_STAGING_ROW_BYTES = 128
# Bytes that staging may take from the ring for a second store in flight.
_STAGING_BYTES = 16 * 1024
_SCRATCH_BYTES = 512
_MAX_STAGES = 12
_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))

# Of the cost model, for an H200: bytes a second from HBM and tensor FLOP a second as measured; what
# L2 gives and what partial sums cost fitted to the best configs (docs/kernels.md).
_HBM = 4.58e12
_L2 = 14e12
_FLOPS = 800e12
_PARTIALS = 9e12
_SPLIT_SECONDS = 1.5e-6
# Seconds that a wave costs whatever it does (ramp of the ring, epilogue), and another kernel.
_WAVE_SECONDS = 1.5e-6
_KERNEL_SECONDS = 2.5e-6
# How much more than its share of HBM one multiprocessor can draw while others idle.
_SM_HEADROOM = 1.2
_TILES_N = (256, 192, 128, 64)
# Depth of a stage of the smallest tile, whose warpgroup else waits for a barrier every 0.2 us: 1 to
# 7 % faster at up to 64 rows; slower with more of them, and with 256 columns (docs/kernels.md).
_DEEP_TILE_K = 128
_MAX_SPLITS = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """How the kernel cuts a problem.

    Attributes:
        tile_n: Weight columns of a program; with `silu_mul` half of them are gates, half ups.
        tile_k: Depth of one stage of the ring.
        num_splits: Programs that share the depth of one tile; each writes its own partial sum.
        stages: Stages of the ring; None: as many as fit.
        consumers: Warpgroups that multiply. `consumers_n` of them share the columns of the tile,
            the others its rows.
        consumers_n: See `consumers`.
        rows: Rows of one consumer: 64 or 128.
        cluster: Programs of neighbouring tiles that load each piece of `x` once for all of them.
        in_flight: Steps whose products may run while the next one's are issued: 0 or 1.
        band: Tiles of rows that go through all columns before the next ones do, so that L2 holds
            their rows; None: all of them.
    """

    tile_n: int
    tile_k: int = 64
    num_splits: int = 1
    stages: int | None = None
    consumers: int = 1
    consumers_n: int = 1
    rows: int = WGMMA_ROWS
    cluster: int = 1
    in_flight: int = 1
    band: int | None = None

    @property
    def tile_m(self) -> int:
        """Rows of a program."""
        return self.rows * (self.consumers // self.consumers_n)

    def padded_rows(self, m: int) -> int:
        """Rows that are computed for `m`: whole 8-row pieces of one tile, or whole tiles."""
        unit = 8 if m <= WGMMA_ROWS == self.tile_m else self.tile_m
        return -(-m // unit) * unit

    def num_programs(self, m: int, n: int) -> int:
        """Pieces of work: tiles of rows, times tiles of columns, times splits."""
        return -(-m // self.tile_m) * (n // self.tile_n) * self.num_splits


# The best of what was tried at 2,048 to 16,384 rows and 28,672 columns (docs/kernels.md).
_MANY_ROWS = Config(tile_n=256, consumers=2, band=16)


def unsupported_reasons(
    m: int,
    k: int,
    n: int,
    dtype: jax.typing.DTypeLike,
    *,
    activation: Activation = None,
    num_splits: int = 1,
) -> list[str]:
    """Why the kernel cannot serve a problem; empty if it can. Does not look at the device."""
    reasons = []
    if jnp.dtype(dtype) not in _DTYPES:
        reasons.append(f"dtype must be bfloat16 or float16, got {jnp.dtype(dtype)}")
    max_rows = MAX_ACTIVATION_ROWS if activation else MAX_ROWS
    if not 1 <= m <= max_rows:
        reasons.append(f"serves 1 to {max_rows} rows, got {m}")
    if k % 64:
        reasons.append(f"the depth must be a multiple of 64, got {k}")
    elif k // 64 % num_splits:
        reasons.append(f"num_splits must divide the {k // 64} steps of the depth, got {num_splits}")
    unit = 128 if activation else 64
    if n % unit:
        reasons.append(f"the columns must be a multiple of {unit}, got {n}")
    return reasons


@functools.cache
def choose_config(
    m: int,
    k: int,
    n: int,
    *,
    activation: Activation = None,
    num_splits: int | None = None,
    summed_here: bool = False,
) -> Config:
    """The cut with the least estimated time.

    Args:
        m: Rows.
        k: Depth.
        n: Weight columns.
        activation: See `linear`.
        num_splits: That many; None leaves the choice free.
        summed_here: A kernel of its own adds up the partial sums, if there are several.

    Raises:
        ValueError: No tile fits.
    """
    if m > MAX_ROWS and n % _MANY_ROWS.tile_n == 0:
        return _MANY_ROWS
    if activation:
        splits = [1]
    elif num_splits is None:
        splits = [s for s in range(1, _MAX_SPLITS + 1) if k // 64 % s == 0]
    else:
        splits = [num_splits]
    candidates = [
        Config(tile_n=tile_n, num_splits=split, consumers=consumers, rows=rows)
        for rows, consumers, accumulators in _row_shapes(m)
        for tile_n in _TILES_N
        for split in splits
        if n % tile_n == 0
        and rows * tile_n <= 128 * accumulators
        and not (activation and tile_n % 128)
    ]
    if not candidates:
        raise ValueError(f"no tile fits {m=}, {k=}, {n=}, {activation=}, {num_splits=}")
    best = min(candidates, key=lambda c: _estimate(c, m, k, n, summed_here=summed_here))
    if best.tile_n == best.tile_m == 64 and k % (_DEEP_TILE_K * best.num_splits) == 0:
        return dataclasses.replace(best, tile_k=_DEEP_TILE_K)
    return best


def _row_shapes(m: int) -> list[tuple[int, int, int]]:
    """Ways to cut the rows: rows of a consumer, consumers, accumulators a thread of one may hold.

    What a thread may hold follows from `_registers`, with room left for addresses.
    """
    if m <= WGMMA_ROWS:
        return [(64, 1, 128)]
    return [(64, 2, 128), (64, 3, 96), (128, 2, 128)]


def _estimate(config: Config, m: int, k: int, n: int, *, summed_here: bool) -> float:
    """Seconds of a product, from the bytes and the products of its programs, wave after wave.

    The longest of three streams (weights from HBM, tiles of both operands from L2, products), at
    the rate of the multiprocessors that have work, and what comes on top of it: ramps, and partial
    sums that are written here and read again by whoever adds them up.
    """
    sms = mosaic_gpu.num_sms()
    programs = config.num_programs(m, n)
    waves = -(-programs // sms)
    busy = programs / (waves * sms)
    rows = min(config.padded_rows(m), config.tile_m)
    memory = 2 * k * n / _HBM / min(1.0, _SM_HEADROOM * busy)
    tiles = 2 * programs * (k // config.num_splits) * (rows + config.tile_n) / _L2 / busy
    depth_flops = 2 * config.tile_m * config.tile_n * (k // config.num_splits)
    tensor = programs * depth_flops / _FLOPS / busy
    seconds = max(memory, tiles, tensor) + waves * _WAVE_SECONDS
    if config.num_splits > 1:
        seconds += _SPLIT_SECONDS + 8 * config.num_splits * m * n / _PARTIALS
        seconds += summed_here * _KERNEL_SECONDS
    return seconds


def _staging(config: Config, width: int, itemsize: int) -> tuple[int, int]:
    """Columns of a piece of a consumer's output that is staged at once, and pieces in flight."""
    chunk = _STAGING_ROW_BYTES // itemsize
    if width % chunk:
        chunk = width
    slots = _STAGING_BYTES // (config.consumers * config.rows * chunk * itemsize)
    pieces = width // chunk
    # Slots are taken in turn from the first on for every tile, so their number divides the pieces:
    # else the first piece of a tile would meet the last one of the tile before in its slot.
    return chunk, max(s for s in range(1, max(1, slots) + 1) if pieces % s == 0)


def _registers(consumers: int) -> tuple[int, int]:
    """Registers of a consumer's and of the producer's threads: what the launch gives, shared out.

    The launch gives every thread the same multiple of 8 that fits the 64 Ki of a multiprocessor.
    """
    launch = min(255, 512 // (consumers + 1)) // 8 * 8
    producer = 24 if consumers > 2 else 40
    return min(240, (launch * (consumers + 1) - producer) // consumers // 8 * 8), producer


def linear(
    x: Float[Array, "m k"],
    w: Float[Array, "..."],
    *,
    config: Config,
    transposed: bool = False,
    activation: Activation = None,
    out_dtype: jax.typing.DTypeLike,
    interpret: Any = None,
) -> Float[Array, "num_splits m n"]:
    """`x @ w` as `num_splits` partial sums (one: the product itself).

    Args:
        x: Rows, `[m, k]`.
        w: `[k, n]`, or `[n, k]` if `transposed`.
        config: The cut.
        transposed: See `w`.
        activation: `silu_mul`: the first half of the columns are gates, the second half ups, and
            the output is `silu(gate) * up`, `[1, m, n / 2]`, from the float32 sums, rounded once.
        out_dtype: Of the output; partial sums should be float32.
        interpret: Parameters of the interpreter, to run without a GPU.

    Raises:
        ValueError: The config does not fit the problem.
    """
    m, k = x.shape
    n = w.shape[0] if transposed else w.shape[1]
    _check_config(config, k, n, activation)
    rows = config.padded_rows(m)
    if rows != m:
        x = jnp.pad(x, ((0, rows - m), (0, 0)))
    call = _kernel(
        rows,
        k,
        n,
        jnp.dtype(x.dtype),
        jnp.dtype(out_dtype),
        config,
        transposed,
        activation,
        interpret,
    )
    return call(x, w)[:, :m]


def _check_config(config: Config, k: int, n: int, activation: Activation) -> None:
    if k % (config.tile_k * config.num_splits):
        raise ValueError(f"{config} does not divide a depth of {k}")
    if n % (config.tile_n * config.cluster):
        raise ValueError(f"{config} does not divide {n} columns")
    if config.consumers % config.consumers_n:
        raise ValueError(f"consumers_n must divide consumers, got {config}")
    if activation and config.num_splits > 1:
        raise ValueError(f"{activation} needs whole sums, got {config}")


@functools.cache
def _kernel(
    m: int,
    k: int,
    n: int,
    dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    config: Config,
    transposed: bool,
    activation: Activation,
    interpret: Any,
) -> Callable[[Array, Array], Array]:
    """Builds the kernel for `m` rows, as `Config.padded_rows` gives them."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    tile_m, tile_n, tile_k = config.tile_m, config.tile_n, config.tile_k
    splits, cluster = config.num_splits, config.cluster
    parts = 2 if activation else 1
    part_n = tile_n // parts  # columns of one box of the weight
    width = part_n // config.consumers_n  # columns of one consumer's accumulator
    n_out = n // parts
    steps = k // tile_k // splits
    m_tiles, n_tiles = max(1, m // tile_m), n // tile_n
    # Clusters take work in this order: the tiles of rows that share a piece of the weight run
    # next to each other, so that L2 answers all but the first.
    groups = m_tiles * (n_tiles // cluster) * splits
    band = min(config.band or m_tiles, m_tiles)
    grid = min(groups, max(1, mosaic_gpu.num_sms() // cluster))

    chunk, staging = _staging(config, width, out_dtype.itemsize)
    staged_bytes = config.consumers * staging * config.rows * chunk * out_dtype.itemsize
    stage_bytes = (tile_m + tile_n) * tile_k * dtype.itemsize
    fitting = (mosaic_gpu.SMEM_BYTES - _SCRATCH_BYTES - staged_bytes) // stage_bytes
    stages = config.stages or min(_MAX_STAGES, fitting)
    valid_rows = min(m, config.rows)

    def work(group: Array) -> tuple[Array, Array, Array]:
        """Row tile, column tile and split of a piece of work."""
        if band < m_tiles:
            whole = band * (n_tiles // cluster) * splits
            first = lax.div(group, whole) * band
            group = lax.rem(group, whole)
            height = jnp.minimum(band, m_tiles - first)
            m_tile, rest = first + lax.rem(group, height), lax.div(group, height)
        else:
            m_tile, rest = lax.rem(group, m_tiles), lax.div(group, m_tiles)
        n_tile = lax.rem(rest, n_tiles // cluster) * cluster
        if cluster > 1:
            n_tile += lax.axis_index("cluster")
        return m_tile, n_tile, lax.div(rest, n_tiles // cluster)

    def produce(x_ref, w_ref, x_smem, w_smem, full, free, first, count):
        def load(step, carry):
            ring, m_tile, n_tile, split = carry
            slot = lax.rem(ring, stages)

            @pl.when(ring >= stages)
            def _():
                plgpu.barrier_wait(free.at[slot])

            depth = pl.ds((split * steps + step) * tile_k, tile_k)
            plgpu.copy_gmem_to_smem(
                x_ref.at[pl.ds(m_tile * tile_m, min(m, tile_m)), depth],
                x_smem.at[slot, pl.ds(0, min(m, tile_m))],
                full.at[slot],
                collective_axes="cluster" if cluster > 1 else None,
            )
            for part in range(parts):
                columns = pl.ds(part * n_out + n_tile * part_n, part_n)
                plgpu.copy_gmem_to_smem(
                    w_ref.at[columns, depth] if transposed else w_ref.at[depth, columns],
                    w_smem.at[slot, part],
                    full.at[slot],
                )
            return ring + 1, m_tile, n_tile, split

        def tile(i, ring):
            carry = (ring, *work(first + i * grid))
            return lax.fori_loop(0, steps, load, carry)[0]

        ring = lax.fori_loop(0, count, tile, jnp.int32(0))

        # Nobody of a cluster may leave while others still arrive on its barriers.
        def drain(i, _):
            plgpu.barrier_wait(free.at[lax.rem(i, stages)])

        lax.fori_loop(jnp.maximum(ring - stages, 0), ring, drain, None)

    def consume(out_ref, x_smem, w_smem, out_smem, full, free, first, count, wg):
        row0 = lax.div(wg, config.consumers_n) * config.rows
        column0 = lax.rem(wg, config.consumers_n) * width

        def weight(slot, part):
            if transposed:
                return w_smem.at[slot, part, pl.ds(column0, width)].transpose((1, 0))
            return w_smem.at[slot, part, :, pl.ds(column0, width)]

        def tile(i, ring):
            m_tile, n_tile, split = work(first + i * grid)

            def multiply(*accumulators):
                def step(j, ring):
                    slot = lax.rem(ring, stages)
                    plgpu.barrier_wait(full.at[slot])
                    rows = x_smem.at[slot, pl.ds(row0, config.rows)]
                    for part, accumulator in enumerate(accumulators):
                        plgpu.wgmma(accumulator, rows, weight(slot, part))
                    # Done are now the products of the step that many before, whose stage can be
                    # filled again while later ones run.
                    plgpu.wgmma_wait(parts * config.in_flight)

                    @pl.when(j >= config.in_flight)
                    def _():
                        plgpu.barrier_arrive(free.at[lax.rem(ring - config.in_flight, stages)])

                    return ring + 1

                lax.fori_loop(0, steps, step, ring)
                sums = [accumulator[...] for accumulator in accumulators]
                for late in range(min(config.in_flight, steps)):
                    plgpu.barrier_arrive(free.at[lax.rem(ring + steps - 1 - late, stages)])
                return sums

            # Gates and ups are two boxes of the weight, and a copy fills whole tiles of shared
            # memory: two accumulators.
            accumulator = plgpu.WGMMAAccumulatorRef((config.rows, width), jnp.float32)
            sums = pl.run_scoped(multiply, *[accumulator] * parts)
            if activation:
                gate, up = sums
                result = gate / (1.0 + jnp.exp(-gate)) * up
            else:
                (result,) = sums
            result = result.astype(out_dtype)
            for c in range(width // chunk):
                tile_smem = out_smem.at[wg, c % staging]
                plgpu.wait_smem_to_gmem(staging - 1, wait_read_only=True)
                tile_smem[...] = result[:, c * chunk : (c + 1) * chunk]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    tile_smem.at[pl.ds(0, valid_rows)],
                    out_ref.at[
                        split,
                        pl.ds(m_tile * tile_m + row0, valid_rows),
                        pl.ds(n_tile * part_n + column0 + c * chunk, chunk),
                    ],
                )
            return ring + steps

        lax.fori_loop(0, count, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def body(x_ref, w_ref, out_ref, x_smem, w_smem, out_smem, full, free):
        first, wg = lax.axis_index("program"), lax.axis_index("wg")
        count = lax.div(groups - first + (grid - 1), grid)
        consumer_registers, producer_registers = _registers(config.consumers)

        @pl.when(wg < config.consumers)
        def _():
            plgpu.set_max_registers(consumer_registers, action="increase")
            consume(out_ref, x_smem, w_smem, out_smem, full, free, first, count, wg)

        @pl.when(wg == config.consumers)
        def _():
            plgpu.set_max_registers(producer_registers, action="decrease")

            # One warp issues: a copy of a whole warpgroup would arrive 128 times.
            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    produce(x_ref, w_ref, x_smem, w_smem, full, free, first, count)

    def entry(x_ref, w_ref, out_ref):
        w_shape = (part_n, tile_k) if transposed else (tile_k, part_n)
        # Both operands of wgmma must lie in the same swizzle.
        transforms = mosaic_gpu.tile_transforms(tile_k if transposed else width, dtype)
        if cluster > 1:
            free = plgpu.ClusterBarrier(
                collective_axes=("cluster",), num_arrivals=config.consumers, num_barriers=stages
            )
        else:
            free = plgpu.Barrier(num_arrivals=config.consumers, num_barriers=stages)
        pl.run_scoped(
            functools.partial(body, x_ref, w_ref, out_ref),
            plgpu.SMEM((stages, tile_m, tile_k), dtype, transforms=transforms),
            plgpu.SMEM((stages, parts, *w_shape), dtype, transforms=transforms),
            plgpu.SMEM(
                (config.consumers, staging, config.rows, chunk),
                out_dtype,
                transforms=mosaic_gpu.tile_transforms(chunk, out_dtype),
            ),
            plgpu.Barrier(num_arrivals=1 + parts, num_barriers=stages),
            free,
            collective_axes="wg",
        )

    clusters = {"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster > 1 else {}
    return plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct((splits, m, n_out), out_dtype),
        grid=(grid,),
        grid_names=("program",),
        num_threads=config.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=_SCRATCH_BYTES
        ),
        interpret=interpret,
        kernel_name="linear",
        **clusters,
    )
