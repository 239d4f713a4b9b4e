"""Choosing tokens of each row from its logits: the most likely ones, or one random draw.

Nothing here sorts the vocabulary or reads a neighbour: a row's result is the same in any batch.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.pallas_kernels import registry
from jpaged.pallas_kernels.mosaic_gpu import device_reasons

_TILE = 128
"""Tokens summed up in the first level of the two-level search."""

_VALUE_STEPS = 24
"""Steps of bisection by value; 32 more by key end any search."""


def argmax(x: jax.Array) -> jax.Array:
    """Returns the first index of each row's maximum: f32[S, V] -> i32[S].

    First the tile, then the place in it: XLA's CPU backend vectorises a plain maximum, but not
    argmax (49,152 tokens, 64 rows, 2 cores: 0.2 ms instead of 7 ms).
    """
    tile, _ = _highest(x)
    lane = jnp.argmax(_tile_of(_in_tiles(x, -jnp.inf), tile), axis=1).astype(jnp.int32)
    return jnp.minimum(tile * _TILE + lane, x.shape[1] - 1)


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns each row's k largest values, f32[S, k], and their indices, i32[S, k].

    As `lax.top_k`: largest first, equal ones by index; but zeros of both signs in any order.
    XLA's GPU backend makes that a sort of whole rows. Here only the tiles are sorted, by their
    maxima, then the elements of the first k of them: an element of any other tile comes after k
    maxima.

    Args:
        x: f32[S, V].
        k: static, at most V.
    """
    if 2 * k * _TILE > x.shape[1]:
        values, indices = lax.top_k(x, k)
        return values, indices
    tiles = _in_tiles(x, -jnp.inf)
    _, chosen = lax.top_k(_to_power_of_two(tiles.max(axis=2)), k)
    # In the order of the vocabulary, which is that of equal values; the padding stays last.
    chosen = jnp.sort(chosen, axis=1)
    candidates = jnp.take_along_axis(tiles, chosen[:, :, None], axis=1).reshape(x.shape[0], -1)
    values, places = lax.top_k(candidates, k)
    tile = jnp.take_along_axis(chosen, places // _TILE, axis=1)
    return values, tile * _TILE + places % _TILE


def all_weights(x: jax.Array, temperature: jax.Array) -> jax.Array:
    """Returns the probabilities of processed logits up to a factor a row, f32[S, V]; at most 1."""
    # As in `argmax`, so that XLA reads the logits once for both.
    _, highest = _highest(x)
    return jnp.exp((x - highest[:, None]) / temperature[:, None])


def kept_weights(
    x: jax.Array, temperature: jax.Array, min_p: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Returns the probabilities up to a factor a row, f32[S, V]; zero for what is not kept.

    First min_p, then top_k, then top_p of what is left. Tokens as likely as the last one that
    top_k or top_p keeps are all kept. The most likely token always is, with weight 1.

    Args:
        x: f32[S, V], processed logits.
        temperature: f32[S], > 0.
        min_p: f32[S], 0 keeps all.
        top_k: i32[S], 0 keeps all.
        top_p: f32[S], > 0; 1 keeps all.
    """
    everything = jnp.full(x.shape[0], -jnp.inf, jnp.float32)
    # Bounds are on the logits: temperature does not change their order.
    bound = lax.cond(
        (top_k > 0).any(),
        lambda: _exclusive_bound(x, None, top_k.astype(jnp.float32), top_k > 0),
        lambda: everything,
    )
    weights = all_weights(x, temperature)
    kept = (weights >= min_p[:, None]) & (x > bound[:, None])
    weights = jnp.where(kept, weights, 0.0)
    bound = lax.cond(
        (top_p < 1.0).any(),
        lambda: _exclusive_bound(x, weights, top_p * weights.sum(axis=1), top_p < 1.0),
        lambda: everything,
    )
    return jnp.where(x > bound[:, None], weights, 0.0)


def draw(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Returns an index a row with probability proportional to weights: f32[S, V] -> i32[S].

    Never one of zero weight, if the row has any other.

    Args:
        weights: f32[S, V].
        uniforms: f32[S, 2], in [0, 1): one chooses the tile, the other the place in it.
    """
    tiles = _in_tiles(weights, 0.0)
    tile = _inverse_cdf(tiles.sum(axis=2), uniforms[:, 0])
    lane = _inverse_cdf(_tile_of(tiles, tile), uniforms[:, 1])
    return jnp.minimum(tile * _TILE + lane, weights.shape[1] - 1)


def choose(
    x: jax.Array,
    temperature: jax.Array,
    random: jax.Array,
    uniforms: jax.Array,
    *,
    implementation: registry.Implementation | None = None,
) -> jax.Array:
    """Returns the most likely token of each row or, where asked for, one drawn from all, i32[S].

    Args:
        x: f32[S, V], logits.
        temperature: f32[S], > 0.
        random: bool[S], where to draw.
        uniforms: f32[S, 2], as `draw`.
        implementation: A name never falls back; None chooses.

    Raises:
        NotImplementedError: The implementation asked for cannot serve the problem.
    """

    def mosaic_gpu_reasons() -> list[str]:
        if reasons := list(device_reasons()):
            return reasons
        from jpaged.pallas_kernels import choose_tokens_mosaic_gpu

        return choose_tokens_mosaic_gpu.unsupported_reasons(x)

    name = registry.choose(
        "choose_tokens", implementation, {"mosaic_gpu": mosaic_gpu_reasons, "xla": list}
    )
    if name == "mosaic_gpu":
        from jpaged.pallas_kernels import choose_tokens_mosaic_gpu

        return choose_tokens_mosaic_gpu.choose_tokens(x, temperature, random, uniforms)
    return jnp.where(random, draw(all_weights(x, temperature), uniforms), argmax(x))


def uniforms(seed: jax.Array, seq_index: jax.Array, position: jax.Array) -> jax.Array:
    """Returns two numbers in [0, 1) a row, f32[S, 2], that depend on these three only.

    The folded key itself is the draw: its two words are one threefry block. No further key may be
    derived from it.

    Args:
        seed: u32[S, 2].
        seq_index: i32[S].
        position: i32[S].
    """

    def words(seed: jax.Array, seq_index: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, seq_index), position)
        return jax.random.key_data(key)

    return (jax.vmap(words)(seed, seq_index, position) >> 8).astype(jnp.float32) * 2.0**-24


def _highest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the tile of each row's maximum, i32[S], and the maximum.

    Which is looked up: XLA would make the maximum of maxima a pass of its own over all of x.
    """
    maxima = _in_tiles(x, -jnp.inf).max(axis=2)
    tile = jnp.argmax(maxima, axis=1).astype(jnp.int32)
    return tile, jnp.take_along_axis(maxima, tile[:, None], axis=1)[:, 0]


def _in_tiles(x: jax.Array, fill: float) -> jax.Array:
    """Returns [S, V] as [S, tiles, _TILE], the end filled up."""
    num_rows, vocab_size = x.shape
    padding = -vocab_size % _TILE
    if padding:
        x = jnp.pad(x, ((0, 0), (0, padding)), constant_values=fill)
    return x.reshape(num_rows, -1, _TILE)


def _to_power_of_two(maxima: jax.Array) -> jax.Array:
    """Returns [S, tiles] with -inf up to a power of two of columns, none of which is in a top k.

    The TPU compiler sorts such rows by another program, compiled sooner: 32 rows of 1,024 in 0.5 s,
    of 1,002 in 2.9.
    """
    num_tiles = maxima.shape[1]
    padding = (1 << (num_tiles - 1).bit_length()) - num_tiles
    return jnp.pad(maxima, ((0, 0), (0, padding)), constant_values=-jnp.inf)


def _tile_of(tiles: jax.Array, index: jax.Array) -> jax.Array:
    """Returns one tile of each row, [S, _TILE]."""
    return jnp.take_along_axis(tiles, index[:, None, None], axis=1)[:, 0]


def _inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns an index a row, i32[S], of positive weight whatever the rounding of the sums."""
    sums = jnp.cumsum(weights, axis=1)
    positive = weights > 0
    reached = positive & (sums > (uniform * sums[:, -1])[:, None])
    indices = jnp.arange(weights.shape[1], dtype=jnp.int32)[None]
    last = jnp.where(positive, indices, 0).max(axis=1)
    return jnp.where(reached.any(axis=1), jnp.argmax(reached, axis=1).astype(jnp.int32), last)


def _exclusive_bound(
    x: jax.Array, weights: jax.Array | None, target: jax.Array, active: jax.Array
) -> jax.Array:
    """Returns a bound a row, f32[S]: the highest above which x holds the target weight.

    Or the target number of elements, without weights. It is -inf if no bound reaches the target,
    and for rows that are not active; elements equal to it are not above it.

    Found by bisection between the row's ends: first in the values, where some 15 steps do, then
    in the integers that order float32s, where each step halves what is left, so that it ends.
    Done when a single element is left between the bounds.
    """

    def above(bound: jax.Array) -> tuple[jax.Array, jax.Array]:
        kept = x > bound[:, None]
        size = kept.sum(axis=1, dtype=jnp.int32)
        if weights is None:
            return size.astype(jnp.float32), size
        return jnp.where(kept, weights, 0.0).sum(axis=1), size

    def unresolved(carry) -> jax.Array:
        _, low, high, low_size, high_size = carry
        return active & (low + 1 < high) & (low_size - high_size > 1)

    def body(carry):
        step, low, high, low_size, high_size = carry
        middle_key = (low & high) + ((low ^ high) >> 1)
        middle = _from_key(low) / 2 + _from_key(high) / 2
        by_value = jnp.isfinite(middle) & (step < _VALUE_STEPS)
        key = jnp.where(by_value, jnp.clip(_to_key(middle), low + 1, high - 1), middle_key)
        reached, size = above(_from_key(key))
        enough = reached >= target
        raise_low = unresolved(carry) & enough
        lower_high = unresolved(carry) & ~enough
        return (
            step + 1,
            jnp.where(raise_low, key, low),
            jnp.where(lower_high, key, high),
            jnp.where(raise_low, size, low_size),
            jnp.where(lower_high, size, high_size),
        )

    reached, size = above(jnp.full(x.shape[0], -jnp.inf, jnp.float32))
    active &= reached >= target
    smallest = jnp.where(x > -jnp.inf, x, jnp.inf).min(axis=1)
    lowest, highest = _to_key(smallest) - 1, _to_key(x.max(axis=1))
    carry = jnp.int32(0), lowest, highest, size, jnp.zeros_like(size)
    _, low, *_ = lax.while_loop(lambda carry: unresolved(carry).any(), body, carry)
    return jnp.where(low == lowest, -jnp.inf, _from_key(low))


def _to_key(x: jax.Array) -> jax.Array:
    """Returns int32s in the order of the float32s."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_key(key: jax.Array) -> jax.Array:
    """Returns the float32s of `_to_key`."""
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)
