"""The TPU kernels that write the pool, interpreted with the race detector."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_no_races, tpu_interpreter

from jpaged.pallas_kernels import (
    KVCacheSpec,
    copy_blocks,
    copy_blocks_mosaic_tpu,
    write_kv,
    write_kv_mosaic_tpu,
)
from jpaged.pallas_kernels.kv_cache_layout import Layout

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _normal(*shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.dtype(dtype))


def _check_write(num_kv_heads, block_size, dtype, slots, layout: Layout = "split"):
    head_dim = 128 if layout == "split" else 64
    spec = KVCacheSpec(
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=jnp.dtype(dtype),
        layout=layout,
    )
    pool = _normal(*spec.shape(6), dtype=dtype)
    k, v = (_normal(len(slots), num_kv_heads, head_dim, dtype=dtype, seed=s) for s in (1, 2))
    slots = jnp.array(slots, jnp.int32)
    expected = write_kv(pool, k, v, slots, implementation="xla")
    out = write_kv_mosaic_tpu.write_kv(pool, k, v, slots, interpret=tpu_interpreter())
    assert_no_races()
    np.testing.assert_array_equal(out.astype(jnp.float32), expected.astype(jnp.float32))


@pytest.mark.parametrize(
    ("num_kv_heads", "block_size", "dtype", "layout"),
    [
        (8, 16, "bfloat16", "split"),
        (3, 32, "bfloat16", "split"),
        (1, 64, "bfloat16", "split"),
        (2, 8, "float32", "split"),
        (3, 16, "bfloat16", "merged"),
    ],
)
def test_write_kv_equals_xla(num_kv_heads, block_size, dtype, layout):
    chunk = range(block_size - 3, block_size + 6)  # over the end of a block
    last = 6 * block_size - 1
    slots = [3 * block_size, *chunk, last, -1, last + 1, 0]
    _check_write(num_kv_heads, block_size, dtype, slots, layout)


def test_write_kv_with_more_windows_than_a_batch_in_any_order():
    slots = np.random.default_rng(0).permutation(np.arange(0, 6 * 64, 7))
    assert len(slots) > write_kv_mosaic_tpu.BATCH
    _check_write(2, 64, "bfloat16", list(slots))


@pytest.mark.parametrize(
    "slots",
    [
        # Windows of 16 written whole, from a token in the middle on, beside some that are not.
        [5, *range(28, 70), 3],
        # Sixteen tokens of a window in another order, with one slot twice, in two parts.
        [*reversed(range(32, 48)), *range(16, 31), 20, *range(56, 64), *range(48, 56)],
    ],
)
def test_write_kv_of_prompts(slots):
    _check_write(2, 32, "bfloat16", slots)


def test_write_kv_keeps_the_later_of_two_tokens_with_one_slot():
    _check_write(1, 16, "bfloat16", [20, 33, 20])


def test_write_kv_with_nothing_to_write():
    _check_write(1, 16, "bfloat16", [-1, 96])


@pytest.mark.parametrize("kinds", [2, 1])
def test_copy_blocks_equals_xla(kinds):
    pool = _normal(8, kinds, 3, 16, 128, dtype="bfloat16")
    # A swap, a chain, two of padding, and two with an id outside the pool.
    src = jnp.array([1, 2, 3, 4, 0, 0, 8, 5], jnp.int32)
    dst = jnp.array([2, 1, 4, 6, 0, 0, 7, -1], jnp.int32)
    expected = copy_blocks(pool, src, dst, implementation="xla")
    out = copy_blocks_mosaic_tpu.copy_blocks(pool, src, dst, interpret=tpu_interpreter())
    assert_no_races()
    np.testing.assert_array_equal(out.astype(jnp.float32), expected.astype(jnp.float32))


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        (lambda pool: write_kv_mosaic_tpu.unsupported_reasons(pool, 4), []),
        (lambda pool: copy_blocks_mosaic_tpu.unsupported_reasons(pool, 4), []),
        (
            lambda pool: write_kv_mosaic_tpu.unsupported_reasons(pool, 20000),
            ["takes 1 to 16384 tokens, got 20000"],
        ),
        (lambda pool: copy_blocks_mosaic_tpu.unsupported_reasons(pool, 0), ["nothing to copy"]),
        (
            lambda pool: copy_blocks_mosaic_tpu.unsupported_reasons(pool, 4096),
            ["takes up to 16777216 bytes at once, got 33554432"],
        ),
    ],
)
def test_reasons(reasons, expected):
    assert reasons(jnp.zeros((2, 2, 1, 16, 128), jnp.bfloat16)) == expected


def test_asked_for_where_it_cannot_run():
    pool = jnp.zeros((2, 2, 1, 16, 128))
    with pytest.raises(NotImplementedError, match="mosaic_tpu cannot run here"):
        write_kv(
            pool, pool[0, :, :, 0], pool[0, :, :, 0], jnp.array([1, 2]), implementation="mosaic_tpu"
        )
    with pytest.raises(NotImplementedError, match="mosaic_tpu cannot run here"):
        copy_blocks(pool, jnp.array([1]), jnp.array([0]), implementation="mosaic_tpu")
