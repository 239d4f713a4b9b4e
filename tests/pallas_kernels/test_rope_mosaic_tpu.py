"""The TPU kernel that rotates heads, interpreted with the race detector."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_no_races, tpu_interpreter

from jpaged.pallas_kernels import rope_mosaic_tpu, rotate

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _case(num_tokens, num_rows, dtype):
    rng = np.random.default_rng(num_tokens + num_rows)
    qkv = jnp.asarray(rng.standard_normal((num_tokens, num_rows * 128)), dtype)
    angles = rng.uniform(0, 6, (num_tokens, 64))
    return qkv, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def _check(num_tokens, num_heads, num_kv_heads, dtype="bfloat16"):
    num_rows = num_heads + 2 * num_kv_heads
    qkv, cos, sin = _case(num_tokens, num_rows, jnp.dtype(dtype))
    q, kv = rope_mosaic_tpu.rotate_heads(
        qkv, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, interpret=tpu_interpreter()
    )
    assert_no_races()
    heads = qkv.reshape(num_tokens, num_rows, 128)
    expected_q, k, v = jnp.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    expected_q, k = rotate(expected_q, cos, sin), rotate(k, cos, sin)
    # A product may be rounded before the sum or not.
    tolerance = 2.0**-7 if q.dtype == jnp.bfloat16 else 1e-6
    for actual, expected in ((q, expected_q), (kv[:, :num_kv_heads], k)):
        assert actual.dtype == qkv.dtype
        np.testing.assert_allclose(
            actual.astype(jnp.float32),
            expected.astype(jnp.float32),
            rtol=tolerance,
            atol=tolerance / 8,
        )
    np.testing.assert_array_equal(kv[:, num_kv_heads:].astype(jnp.float32), v.astype(jnp.float32))


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "dtype"),
    [
        (8, 4, 2, "bfloat16"),
        (24, 5, 1, "bfloat16"),  # groups of 8, an even number of rows, an odd one of queries
        (48, 4, 4, "bfloat16"),
        (16, 3, 1, "float32"),
    ],
)
def test_rotates_as_xla(num_tokens, num_heads, num_kv_heads, dtype):
    _check(num_tokens, num_heads, num_kv_heads, dtype)


def test_rotates_in_several_programs_of_several_groups():
    _check(256, 2, 1)


def test_programs_hold_fewer_tokens_of_wide_rows(monkeypatch):
    monkeypatch.setattr(rope_mosaic_tpu, "BLOCK_BYTES", 32 * 4 * 128 * 2)
    assert rope_mosaic_tpu._block_tokens(64, 4 * 128 * 2) == 32
    _check(64, 2, 1)


def test_reasons():
    assert rope_mosaic_tpu.unsupported_reasons(8, 128, jnp.bfloat16) == []
    assert rope_mosaic_tpu.unsupported_reasons(12, 64, jnp.float16) == [
        "needs head_dim 128, got 64",
        "needs bfloat16 or float32, got float16",
        "needs a multiple of 8 tokens, got 12",
    ]
