"""The filters and the draw, against a numpy oracle that sorts."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jpaged.token_choice import argmax, draw, kept_weights, top_k, uniforms

ROWS = 4
# Float32 sums of at most a few hundred weights; the bound of a top_p may fall on either side.
MASS_ROUNDING = 1e-5

jitted_kept_weights = jax.jit(kept_weights)
jitted_draw = jax.jit(draw)


def kept(
    x: Any, *, temperature: Any = 1.0, min_p: Any = 0.0, top_k: Any = 0, top_p: Any = 1.0
) -> np.ndarray:
    """Returns f32[S, V]; parameters may be one value or one a row."""
    rows = np.ones(len(x), np.float32)
    weights = jitted_kept_weights(
        np.asarray(x, np.float32),
        rows * np.asarray(temperature, np.float32),
        rows * np.asarray(min_p, np.float32),
        (rows * np.asarray(top_k)).astype(np.int32),
        rows * np.asarray(top_p, np.float32),
    )
    return np.asarray(weights)


def sorted_oracle(x, temperature, min_p, top_k):
    """Returns which of f64[V] are left after min_p and top_k, and their weights."""
    weights = np.exp((x - x.max()) / temperature)
    left = weights >= min_p
    if 0 < top_k < len(x):
        left &= x >= np.sort(x)[::-1][top_k - 1]
    return left, np.where(left, weights, 0.0)


def check_row(x, weights, temperature, min_p, top_k, top_p):
    x = x.astype(np.float64)
    left, expected = sorted_oracle(x, temperature, np.float32(min_p), top_k)
    got = weights > 0
    assert got[x.argmax()]
    np.testing.assert_allclose(weights[got], expected[got], rtol=1e-5)
    missing = (expected > 1e-30) & ~got
    if top_p == 1.0:
        assert not missing.any()
        assert not (got & ~left).any()
        return
    total = expected.sum()
    lowest = x[got].min()
    assert x[missing].max(initial=-np.inf) < lowest, "ties with the last kept token are kept"
    assert expected[x >= lowest].sum() >= (top_p - MASS_ROUNDING) * total, "too few are kept"
    assert expected[x > lowest].sum() <= (top_p + MASS_ROUNDING) * total, "too many are kept"


ROW = st.tuples(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["normal", "peaked", "ties", "equal", "masked", "one", "signed zeros"]),
    st.sampled_from([0.01, 0.7, 1.0, 5.0]),
    st.sampled_from([0.0, 0.0, 0.03, 0.5, 1.0]),
    st.one_of(st.just(0), st.integers(1, 150)),
    st.sampled_from([1.0, 1.0, 1e-6, 0.1, 0.5, 0.9, 0.999999]),
)


def logits_of_kind(kind, seed, vocab_size):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 3, vocab_size).astype(np.float32)
    match kind:
        case "peaked":
            x *= 20
        case "ties":
            x = np.round(x)
        case "equal":
            x[:] = x[0]
        case "masked":
            x[rng.random(vocab_size) < 0.9] = -np.inf
            x[rng.integers(vocab_size)] = 1.0
        case "one":
            x[:] = -np.inf
            x[rng.integers(vocab_size)] = -50.0
        case "signed zeros":
            x = np.where(x < 0, np.float32(-0.0), np.float32(0.0))
    return x


@settings(max_examples=120, deadline=None, derandomize=True)
@given(rows=st.lists(ROW, min_size=ROWS, max_size=ROWS))
@example(rows=[(0, "ties", 1.0, 0.0, 5, 0.5), *[(0, "normal", 1.0, 0.0, 0, 1.0)] * 3])
def test_kept_tokens_are_those_of_a_sort(rows):
    vocab_size = 131  # odd: two tiles, the second nearly empty
    x = np.stack([logits_of_kind(kind, seed, vocab_size) for seed, kind, *_ in rows])
    _, _, temperature, min_p, top_k, top_p = map(list, zip(*rows, strict=True))
    weights = kept(x, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    for i in range(ROWS):
        check_row(x[i], weights[i], temperature[i], min_p[i], top_k[i], top_p[i])


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 1000])
def test_any_vocabulary_size(vocab_size):
    x = np.stack([logits_of_kind("normal", seed, vocab_size) for seed in range(ROWS)])
    weights = kept(x, top_k=[0, 1, 7, 7], top_p=[0.6, 0.6, 1.0, 0.6], min_p=[0, 0, 0.01, 0])
    for i, row in enumerate([(0, 0, 0.6), (0, 1, 0.6), (0.01, 7, 1.0), (0, 7, 0.6)]):
        check_row(x[i], weights[i], 1.0, *row)
    np.testing.assert_array_equal(jax.jit(argmax)(x), x.argmax(axis=1))


def test_top_k_keeps_exactly_k_of_a_large_vocabulary():
    x = np.random.default_rng(0).normal(0, 3, (3, 49_152)).astype(np.float32)
    sizes = (kept(x, top_k=[1, 50, 20_000]) > 0).sum(axis=1)
    assert sizes.tolist() == [1, 50, 20_000]


def test_an_element_that_bisection_meets_is_not_kept():
    x = [[64.0, 40.0, 31.0, -2.0]]  # 31 is the middle of the ends
    assert (kept(x, top_k=2) > 0).tolist() == [[True, True, False, False]]
    assert (kept(x, temperature=9, top_k=3) > 0).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("outlier", [0.0, -1e35])
def test_top_k_is_exact_at_any_scale(scale, outlier):
    x = np.random.default_rng(0).normal(0, 1, (1, 131)).astype(np.float32) * np.float32(scale)
    x[0, 5] = outlier
    top_k = np.argsort(-x[0])[:40]
    weights = kept(x, temperature=1e30, top_k=40)
    assert np.flatnonzero(weights[0]).tolist() == sorted(top_k)


def test_fewer_tokens_than_top_k_are_all_kept():
    x = np.full((2, 131), -np.inf)
    x[:, [3, 7, 130]] = 1.0, -1.0, 0.0
    assert ((kept(x, top_k=[50, 3]) > 0) == (x > -np.inf)).all()


def test_top_p_and_top_k_combine_on_what_is_left():
    # Of 0.4, 0.3, 0.2, 0.1 top_k = 2 leaves 4/7 and 3/7: top_p = 0.5 is then reached by the first.
    x = np.log(np.array([[0.4, 0.3, 0.2, 0.1]]))
    assert (kept(x, top_p=0.5) > 0).tolist() == [[True, True, False, False]]
    assert (kept(x, top_p=0.5, top_k=2) > 0).tolist() == [[True, False, False, False]]
    assert (kept(x, min_p=0.6) > 0).tolist() == [[True, True, False, False]]


def test_a_row_does_not_change_with_what_its_neighbours_use():
    x = np.stack([logits_of_kind("normal", seed, 131) for seed in range(ROWS)])
    alone = kept(x, top_k=[0, 9, 0, 0], top_p=[1.0, 1.0, 1.0, 0.7])
    plain = kept(x)
    np.testing.assert_array_equal(alone[0], plain[0])
    np.testing.assert_array_equal(alone[2], plain[2])
    np.testing.assert_array_equal(alone[1], kept(x, top_k=[0, 9, 3, 3], top_p=[0.2, 1, 1, 1])[1])
    np.testing.assert_array_equal(alone[3], kept(x, top_k=[5, 0, 3, 0], top_p=0.7)[3])


def test_argmax_is_the_first_maximum_as_in_numpy():
    x = np.round(np.random.default_rng(0).normal(0, 1, (50, 300))).astype(np.float32)
    x[0] = -np.inf
    x[1, 5:] = np.inf
    np.testing.assert_array_equal(jax.jit(argmax)(x), x.argmax(axis=1))


def test_argmax_of_nans_is_a_token():
    x = jnp.full((2, 131), jnp.nan)
    assert (np.asarray(argmax(x)) < 131).all()


@pytest.mark.parametrize("vocab_size", [1, 128, 131, 300, 1024, 5000])
@pytest.mark.parametrize("k", [1, 2, 3, 17, 19, 20, 5000])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "masked", "one"])
def test_top_k_is_that_of_a_sort(vocab_size, k, kind):
    k = min(k, vocab_size)
    x = np.stack([logits_of_kind(kind, seed, vocab_size) for seed in range(ROWS)])
    x += 0.0  # no negative zeros, which lax.top_k puts after the others
    x[1] = -np.inf
    x[2, vocab_size // 3 :] = -np.inf
    x[3, -vocab_size // 3 :] = np.inf
    values, indices = map(np.asarray, jax.jit(top_k, static_argnums=1)(x, k))
    expected = np.argsort(-x, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=1))
    for got, reference in zip((values, indices), jax.lax.top_k(x, k), strict=True):
        assert (got.shape, got.dtype) == (reference.shape, reference.dtype)
        np.testing.assert_array_equal(got, reference)


def test_top_k_never_tells_of_the_padding():
    x = np.full((2, 1025), -np.inf, np.float32)  # of the last tile one element is no padding
    x[0, -1] = x[1, 400] = 0.0
    _, indices = jax.jit(top_k, static_argnums=1)(x, 4)
    assert np.asarray(indices).tolist() == [[1024, 0, 1, 2], [400, 0, 1, 2]]


def test_top_k_of_signed_zeros_is_as_many_zeros():
    x = np.stack([logits_of_kind("signed zeros", seed, 5000) for seed in range(ROWS)])
    values, indices = map(np.asarray, jax.jit(top_k, static_argnums=1)(x, 19))
    assert (values == 0).all()
    assert all(len(set(row)) == 19 for row in indices.tolist())


def test_a_few_of_many_are_found_without_sorting_the_vocabulary():
    lowered = jax.jit(top_k, static_argnums=1).lower(np.zeros((2, 49_152), np.float32), 20)
    sorted_widths = re.findall(r"top_k.*tensor<2x(\d+)xf32>\s*->", lowered.as_text())
    assert sorted(map(int, sorted_widths)) == [512, 2560]


LARGEST = 1 - 2.0**-24


@pytest.mark.parametrize("vocab_size", [1, 5, 131, 512])
@pytest.mark.parametrize("tile_uniform", [0.0, 0.5, LARGEST])
@pytest.mark.parametrize("lane_uniform", [0.0, 0.5, LARGEST])
def test_a_masked_token_is_never_drawn(vocab_size, tile_uniform, lane_uniform):
    rng = np.random.default_rng(vocab_size)
    scale = 10.0 ** rng.integers(-30, 1, (40, vocab_size))
    weights = np.where(rng.random((40, vocab_size)) < 0.1, scale, 0.0).astype(np.float32)
    weights[np.arange(40), rng.integers(vocab_size, size=40)] = 1.0
    uniform = np.full((40, 2), [tile_uniform, lane_uniform], np.float32)
    tokens = np.asarray(jitted_draw(weights, uniform))
    assert (weights[np.arange(40), tokens] > 0).all()


def test_the_ends_of_the_uniform_are_the_ends_of_the_vocabulary():
    weights = np.zeros((2, 300), np.float32)
    weights[:, [3, 140, 290]] = 1.0
    ends = np.array([[0.0, 0.0], [LARGEST, LARGEST]], np.float32)
    assert np.asarray(jitted_draw(weights, ends)).tolist() == [3, 290]


def test_a_draw_without_any_weight_is_still_a_token():
    weights = np.stack([np.zeros(131), np.full(131, np.nan)]).astype(np.float32)
    tokens = np.asarray(jitted_draw(weights, np.full((2, 2), 0.5, np.float32)))
    assert ((tokens >= 0) & (tokens < 131)).all()


def draw_uniforms(seed, seq_index, position):
    count = len(position)
    seeds = jnp.tile(jnp.array(seed, jnp.uint32), (count, 1))
    indices = jnp.full(count, seq_index, jnp.int32)
    return np.asarray(uniforms(seeds, indices, jnp.array(position, jnp.int32)))


def test_uniforms_are_uniform_and_their_two_halves_independent():
    got = draw_uniforms([1, 2], 0, np.arange(6400))
    assert got.min() >= 0
    assert got.max() < 1
    cells = np.histogram2d(got[:, 0], got[:, 1], bins=8, range=[[0, 1]] * 2)[0]
    # Chi-square with 63 degrees of freedom: above 104 with probability 0.001.
    assert ((cells - 100) ** 2 / 100).sum() < 104


def test_uniforms_depend_on_both_seed_words_the_sequence_and_the_position():
    base = draw_uniforms([1, 2], 0, [7])
    np.testing.assert_array_equal(base, draw_uniforms([1, 2], 0, [5, 6, 7])[2:])
    for other in ([1, 3], 0, [7]), ([2, 2], 0, [7]), ([1, 2], 1, [7]), ([1, 2], 0, [8]):
        assert (base != draw_uniforms(*other)).all()


def test_uniforms_stay_what_they_were():
    # A change here changes every seeded output of every user.
    got = draw_uniforms([42, 0], 1, [0, 1])
    key = jax.random.fold_in(jax.random.key(42, impl="threefry2x32"), 1)
    words = np.stack([jax.random.key_data(jax.random.fold_in(key, i)) for i in range(2)])
    expected_key = np.asarray(jax.random.key_data(jax.random.key(42, impl="threefry2x32")))
    assert expected_key.tolist() == [0, 42]
    swapped = draw_uniforms([0, 42], 1, [0, 1])
    np.testing.assert_array_equal(swapped, (words >> 8) * 2.0**-24)
    assert (got != swapped).all()
