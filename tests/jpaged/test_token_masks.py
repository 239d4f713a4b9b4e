"""Masks on their way to the device: only the rows named change, by as few programs as can be."""

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.token_masks import TokenMasks

VOCAB_SIZE = 70
WIDTH = 3


def _here(shapes):
    return shapes


@pytest.mark.parametrize(
    ("num_rows", "sizes"), [(1, [1]), (4, [4]), (8, [8]), (9, [8, 9]), (256, [8, 64, 256])]
)
def test_there_are_few_programs(num_rows, sizes):
    names = [f"set_masks_{size}" for size in sizes]
    assert list(TokenMasks(num_rows, VOCAB_SIZE, _here).programs()) == names


@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
def test_only_the_rows_named_get_a_mask(count):
    masks = TokenMasks(20, VOCAB_SIZE, _here)
    programs = {name: compile() for name, compile in masks.programs().items()}
    rng = np.random.default_rng(count)
    want = rng.integers(-(2**31), 2**31, (20, WIDTH)).astype(np.int32)
    allowed = jnp.asarray(want)
    for _ in range(10):  # more often than there are buffers
        rows = rng.permutation(20)[:count].tolist()
        new = rng.integers(-(2**31), 2**31, (count, WIDTH)).astype(np.int32)

        def fill(out, new=new):
            assert out.flags.c_contiguous
            out[:] = new

        allowed = masks.send(allowed, *masks.fill(rows, fill), programs.__getitem__)
        want[rows] = new
        np.testing.assert_array_equal(np.asarray(allowed), want)
