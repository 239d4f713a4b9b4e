"""The most likely token or a draw: the GPU kernels, interpreted, and XLA, against float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import require_gpu_interpreter
from token_draws import TILE, check_draws, draw_case

from jpaged.token_choice import choose

BELOW_ONE = 1 - 2.0**-24


def _mosaic(*args: Any) -> Any:
    require_gpu_interpreter()
    from jpaged.pallas_kernels.choose_tokens_mosaic_gpu import choose_tokens

    return jax.jit(functools.partial(choose_tokens, interpret=True))(*args)


CHOOSE = {"mosaic": _mosaic, "xla": jax.jit(functools.partial(choose, implementation="xla"))}


@pytest.mark.parametrize("num_tiles", [32, 37, 130])
@pytest.mark.parametrize("name", CHOOSE)
def test_draws_by_weight_and_else_takes_the_most_likely(name, num_tiles):
    x, temperature, random, uniforms = draw_case(num_tiles)
    x[0, 5] = x[0, -1] = x[-1, 300] = x[-1, 700] = 50  # equal ones: the first
    uniforms[:3] = [[0, 0], [BELOW_ONE, BELOW_ONE], [0, BELOW_ONE]]
    tokens = CHOOSE[name](x, temperature, random, uniforms)
    check_draws(x, temperature, random, uniforms, tokens)


@pytest.mark.parametrize("name", CHOOSE)
@pytest.mark.parametrize("token", [0, 127, 128, 2000, 32 * TILE - 1])
def test_draws_what_alone_has_weight(name, token):
    """Other tokens have -inf or underflow; tiles of nothing but -inf are no NaN."""
    x, temperature, random, uniforms = draw_case(32)
    x[:4], x[4:] = -np.inf, -1e4
    x[:, token] = -3.0
    uniforms[:2] = [[0, 0], [BELOW_ONE, BELOW_ONE]]
    np.testing.assert_array_equal(CHOOSE[name](x, temperature, random, uniforms), token)


def test_a_row_does_not_depend_on_its_neighbours():
    x, temperature, random, uniforms = draw_case(40)
    whole = _mosaic(x, temperature, random, uniforms)
    for row in (0, 5, 7):
        alone = [array[row : row + 1] for array in (x, temperature, random, uniforms)]
        assert _mosaic(*alone)[0] == whole[row]


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((4, 50272), jnp.float32, "a multiple of 128 from 4096 to 524288 tokens, got 50272"),
        ((4, 2048), jnp.float32, "got 2048"),
        ((4, 4096), jnp.bfloat16, "needs float32 logits, got bfloat16"),
        ((0, 4096), jnp.float32, "no rows"),
    ],
)
def test_refuses(shape, dtype, message):
    require_gpu_interpreter()
    from jpaged.pallas_kernels.choose_tokens_mosaic_gpu import unsupported_reasons

    assert message in "; ".join(unsupported_reasons(jnp.zeros(shape, dtype)))


@pytest.mark.parametrize("shape", [(1, 4096), (64, 128256), (1024, 151936), (8, 524288)])
def test_lowers_for_a_gpu(shape):
    require_gpu_interpreter()
    from jpaged.pallas_kernels.choose_tokens_mosaic_gpu import choose_tokens

    rows = shape[0]
    arguments = (
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.bool_),
        jax.ShapeDtypeStruct((rows, 2), jnp.float32),
    )
    lowered = jax.jit(choose_tokens).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 2
