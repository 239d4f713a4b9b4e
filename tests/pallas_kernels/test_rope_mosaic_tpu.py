"""The TPU kernel that rotates heads, interpreted with the race detector."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_no_races, tpu_interpreter

from jpaged.pallas_kernels import (
    KVCacheSpec,
    registry,
    rope_mosaic_tpu,
    rope_write_kv,
    rotate,
    write_kv_mosaic_tpu,
)
from jpaged.pallas_kernels.rope_write_kv import _rotation

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
        (24, 5, 1, "bfloat16"),  # groups of 8, odd numbers of rows and of queries
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


def test_what_is_rotated_is_written_as_xla_writes_it():
    qkv, cos, sin = _case(24, 8, jnp.dtype("float32"))
    slots = jnp.asarray([*range(21, 43), -1, 3], jnp.int32)
    pool = jnp.zeros((4, 2, 2, 16, 128), jnp.float32)
    expected, _ = rope_write_kv(pool, qkv, cos, sin, slots, num_heads=4, implementation="xla")
    _, kv = rope_mosaic_tpu.rotate_heads(
        qkv, cos, sin, num_heads=4, num_kv_heads=2, interpret=tpu_interpreter()
    )
    written = write_kv_mosaic_tpu.write_rows(pool, kv, slots, tpu_interpreter())
    assert_no_races()
    np.testing.assert_allclose(written, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("head_dim", "num_tokens", "dtype", "why"),
    [
        (128, 8, "bfloat16", "mosaic_tpu (first choice)"),
        (128, 9, "bfloat16", "xla (mosaic_tpu refused: needs a multiple of 8 tokens, got 9)"),
        (128, 8, "int8", "xla (mosaic_tpu refused: does not scale keys and values"),
        (64, 8, "bfloat16", "xla (mosaic_tpu refused: needs head_dim 128, got 64)"),
    ],
)
def test_who_rotates_is_logged(head_dim, num_tokens, dtype, why, caplog, monkeypatch):
    monkeypatch.setattr(registry, "_logged", set())
    caplog.set_level("INFO", registry.logger.name)
    spec = KVCacheSpec(
        block_size=32, num_kv_heads=2, head_dim=head_dim, dtype=jnp.dtype(dtype), layout="split"
    )
    _rotation(spec, jnp.zeros((num_tokens, 8 * head_dim), jnp.bfloat16))
    assert f"rotate_heads: {why}" in caplog.text


def test_reasons():
    assert rope_mosaic_tpu.unsupported_reasons(8, 128, jnp.bfloat16) == []
    assert rope_mosaic_tpu.unsupported_reasons(12, 64, jnp.float16) == [
        "needs head_dim 128, got 64",
        "needs bfloat16 or float32, got float16",
        "needs a multiple of 8 tokens, got 12",
    ]
