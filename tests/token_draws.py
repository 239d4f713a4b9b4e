"""Rows to choose tokens of, and what a choice must be, in float64."""

from typing import Any

import numpy as np

TILE = 128
# Of a cumulative sum of float32 weights, in shares of the whole.
ROUNDING = 1e-5


def draw_case(num_tiles: int, num_rows: int = 8, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Logits, temperatures, which rows draw (not the last two), and uniforms."""
    rng = np.random.default_rng(seed)
    x = 4 * rng.standard_normal((num_rows, num_tiles * TILE)).astype(np.float32)
    temperature = rng.uniform(0.3, 2, num_rows).astype(np.float32)
    random = np.arange(num_rows) < num_rows - 2
    return x, temperature, random, rng.random((num_rows, 2)).astype(np.float32)


def _assert_reached(weights: np.ndarray, index: int, uniform: float) -> None:
    """That the cumulative weight up to `index` is the first to pass `uniform`, but for rounding."""
    shares = np.cumsum(weights) / weights.sum()
    assert weights[index] > 0
    assert shares[index] > uniform - ROUNDING
    assert index == 0 or shares[index - 1] <= uniform + ROUNDING


def check_draws(x: Any, temperature: Any, random: Any, uniforms: Any, tokens: Any) -> None:
    """That a row has its most likely token or, where it draws, the one its uniforms choose."""
    for row, token in enumerate(np.asarray(tokens)):
        if not random[row]:
            assert token == x[row].argmax()
            continue
        logits = x[row].astype(np.float64)
        weights = np.exp((logits - logits.max()) / temperature[row])
        tiles = weights.reshape(-1, TILE)
        tile, lane = divmod(int(token), TILE)
        _assert_reached(tiles.sum(1), tile, uniforms[row, 0])
        _assert_reached(tiles[tile], lane, uniforms[row, 1])
