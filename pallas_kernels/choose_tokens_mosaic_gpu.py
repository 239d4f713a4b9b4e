"""A token a row, the most likely one or a draw from all of them, on Mosaic GPU: two kernels.

The first reads the logits once and leaves the maximum and the sum of weights of every tile of 128
tokens; a program of the second has all of a row's, finds a tile, then a token in it. XLA needs two
passes over the logits, as the weights depend on the maximum of the whole row, and some twenty small
kernels for the rest, each with a launch of its own.
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jpaged.pallas_kernels.mosaic_gpu import store

TILE = 128
# Tiles of a program of the first kernel: 16 KiB, so that many programs share a multiprocessor.
TILES = 32
# Threads of a program, and elements that a thread loads at once.
THREADS = 128
VECTOR = 4
# Tiles that the 128 threads of a program hold in registers without spilling.
MAX_TILES = 4096
_LOWEST = float(jnp.finfo(jnp.float32).min)


def unsupported_reasons(x: jax.Array) -> list[str]:
    """Why the kernels cannot serve these logits on a GPU that they run on; empty if they can."""
    num_rows, vocab_size = x.shape
    reasons = []
    if x.dtype != jnp.float32:
        reasons.append(f"needs float32 logits, got {x.dtype}")
    if vocab_size % TILE or not TILES <= vocab_size // TILE <= MAX_TILES:
        reasons.append(
            f"needs a vocabulary of a multiple of {TILE} from {TILES * TILE} to "
            f"{MAX_TILES * TILE} tokens, got {vocab_size}"
        )
    if not num_rows:
        reasons.append("no rows")
    return reasons


def choose_tokens(
    x: Float[Array, "num_rows vocab_size"],
    temperature: Float[Array, " num_rows"],
    random: Bool[Array, " num_rows"],
    uniforms: Float[Array, "num_rows 2"],
    *,
    interpret: bool = False,
) -> Int32[Array, " num_rows"]:
    """See `token_choice.choose`; `interpret` runs it on the CPU."""
    num_rows, vocab_size = x.shape
    num_tiles = vocab_size // TILE
    parameters = {
        # No memory is both read and written here.
        "compiler_params": plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=512
        ),
        "interpret": plgpu.InterpretGPUParams() if interpret else None,
    }
    x = x.reshape(num_rows, num_tiles, TILE)
    # Whole loads of all threads; what is past the last tile is never written, and not looked at.
    unit = THREADS * VECTOR
    padded = jax.ShapeDtypeStruct((num_rows, -(-num_tiles // unit) * unit), jnp.float32)
    maxima, sums = plgpu.kernel(
        functools.partial(_summarise, num_tiles),
        out_type=(padded, padded),
        grid=(num_rows, pl.cdiv(num_tiles, TILES)),
        grid_names=("row", "chunk"),
        kernel_name="token_tiles",
        **parameters,
    )(x, temperature)
    return plgpu.kernel(
        functools.partial(_choose, num_tiles),
        out_type=jax.ShapeDtypeStruct((num_rows,), jnp.int32),
        grid=(num_rows,),
        grid_names=("row",),
        kernel_name="choose_tokens",
        **parameters,
    )(x, maxima, sums, temperature, random.astype(jnp.int32), uniforms)


def _summarise(num_tiles: int, x_ref, temperature_ref, maxima_ref, sums_ref) -> None:
    """Maxima and sums of the weights, as if those were the row's maxima, of TILES tiles."""
    row = lax.axis_index("row")
    # The last ones overlap those before, and write the same.
    tiles = pl.ds(jnp.minimum(lax.axis_index("chunk") * TILES, num_tiles - TILES), TILES)
    layout = _tiles_layout()
    x = plgpu.load(x_ref.at[row, tiles], layout=layout, optimized=False)
    maxima = jnp.max(x, axis=1)
    # A tile of -inf has weights of zero, not of NaN.
    base = lax.broadcast_in_dim(jnp.maximum(maxima, _LOWEST), x.shape, [0])
    weights = _weights(x, plgpu.layout_cast(base, layout), temperature_ref[row])
    store(maxima_ref.at[row, tiles], maxima)
    store(sums_ref.at[row, tiles], jnp.sum(weights, axis=1))


def _choose(
    num_tiles: int, x_ref, maxima_ref, sums_ref, temperature_ref, random_ref, uniforms_ref, out_ref
) -> None:
    """The token of a row, from what is known of its tiles."""
    row = lax.axis_index("row")
    temperature = temperature_ref[row]
    layout = _row_layout(VECTOR)
    maxima = plgpu.load(maxima_ref.at[row], layout=layout, optimized=False)
    sums = plgpu.load(sums_ref.at[row], layout=layout, optimized=False)
    tile = plgpu.broadcasted_iota(jnp.int32, maxima.shape, 0, layout=layout)
    exists = tile < num_tiles
    maxima = jnp.where(exists, maxima, -jnp.inf)
    highest = jnp.max(maxima)
    weights = jnp.where(exists, sums * _weights(maxima, highest, temperature), 0.0)
    likely_tile = _first(maxima == highest, tile, num_tiles)
    drawn_tile = _inverse_cdf(weights, tile, uniforms_ref[row, 0])

    layout = _row_layout(1)
    token = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout)
    x = plgpu.load(x_ref.at[row, likely_tile], layout=layout, optimized=False)
    likely = likely_tile * TILE + _first(x == highest, token, TILE)
    x = plgpu.load(x_ref.at[row, drawn_tile], layout=layout, optimized=False)
    weights = _weights(x, highest, temperature)
    drawn = drawn_tile * TILE + _inverse_cdf(weights, token, uniforms_ref[row, 1])
    out_ref[row] = jnp.where(random_ref[row] != 0, drawn, likely)


def _weights(x: Array, highest: Array, temperature: Array) -> Array:
    return jnp.exp2((x - highest) * (math.log2(math.e) / temperature))


def _first(found: Array, index: Array, size: int) -> Array:
    """The least index that is found; the last one if none is."""
    return jnp.min(jnp.where(found, index, size - 1))


def _inverse_cdf(weights: Array, index: Array, uniform: Array) -> Array:
    """An index of positive weight, by bisection: the first whose sum from the left is enough.

    A sum up to an index of no weight is that up to the one before it, to the last bit, so such an
    index is never the first.
    """
    target = uniform * jnp.sum(weights)

    def step(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) >> 1
        enough = jnp.sum(jnp.where(index <= middle, weights, 0.0)) > target
        return (
            jnp.where(enough, low, jnp.minimum(middle + 1, high)),
            jnp.where(enough, middle, high),
        )

    last = jnp.max(jnp.where(weights > 0, index, 0))
    steps = (weights.shape[0] - 1).bit_length()
    return lax.fori_loop(0, steps, step, (jnp.int32(0), last))[0]


def _tiles_layout():
    """Tiles over warps and quarters of them, a tile over 8 threads in loads of 16 bytes."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((16, 32), (4, 32), (VECTOR,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def _row_layout(vector: int):
    """A row over 128 threads."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((THREADS * vector,), (32 * vector,), (vector,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    )
