"""Pools of int8 and float8_e4m3fn, with scales."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_no_races, tpu_interpreter

from jpaged.pallas_kernels import (
    KVCacheSpec,
    copy_blocks,
    copy_blocks_mosaic_tpu,
    mosaic_gpu,
    paged_attention,
    rope_write_kv,
    rotate,
    write_kv,
    write_kv_mosaic_tpu,
)
from jpaged.pallas_kernels.kv_cache_layout import Layout
from jpaged.pallas_kernels.paged_attention import mosaic_tpu, reference
from jpaged.pallas_kernels.paged_attention.cases import CASES, Case, make

pytestmark = pytest.mark.usefixtures("quick_compilation")

INT8, FP8 = jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn)
LARGEST = {INT8: 127, FP8: 448}
K_SCALE, V_SCALE = [0.03, 0.05], [0.04, 0.01]
# As test_paged_attention.py.
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 3e-2}

both_dtypes = pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)


def _pool(dtype, *, layout: Layout = "split", head_dim=128, num_kv_heads=2):
    return KVCacheSpec(
        block_size=32, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, layout=layout
    ).allocate(6)


def _normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _stored(x, scale, dtype):
    """The definition, by NumPy."""
    x = np.asarray(x, np.float32) / np.asarray(scale, np.float32)
    x = np.clip(x, -128 if dtype == INT8 else -448, LARGEST[dtype])
    return np.rint(x) if dtype == INT8 else x.astype(ml_dtypes.float8_e4m3fn)


@both_dtypes
@pytest.mark.parametrize("layout", ["split", "merged"])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
def test_write_kv_rounds_scales_and_clips(dtype, layout, x_dtype):
    k, v = (10 * _normal(5, 2, 64, dtype=x_dtype, seed=s) for s in (1, 2))
    k, v = k.at[0, 0, :4].set(jnp.array([1e6, -1e6, 0.5, -1.5], x_dtype)), v.at[0, 1, 3].set(1e6)
    slots = jnp.array([3, 40, 41, 64, 10**6])
    pool = _pool(dtype, layout=layout, head_dim=64)
    k_scale = jnp.array([1.0, 0.25])
    out = write_kv(pool, k, v, slots, k_scale=k_scale, v_scale=0.125)
    assert out.dtype == dtype
    expected = np.zeros((6 * 32, 2, 2, 64), np.float32)
    expected[slots[:4], 0] = _stored(k[:4], k_scale[:, None], dtype)
    expected[slots[:4], 1] = _stored(v[:4], 0.125, dtype)
    assert np.abs(expected).max() in (128, 448), "some are clipped"
    rows = np.asarray(out, np.float32)
    if layout == "merged":
        rows = np.concatenate(np.split(rows, 2, axis=-1), axis=1)
    np.testing.assert_array_equal(np.moveaxis(rows, 3, 1).reshape(expected.shape), expected)


@both_dtypes
def test_write_kv_is_in_place_when_donated(dtype):
    pool, kv = (
        KVCacheSpec(block_size=32, num_kv_heads=2, head_dim=64, dtype=dtype).allocate(64),
        _normal(2, 2, 64),
    )
    step = jax.jit(write_kv, donate_argnums=0)
    analysis = step.lower(pool, kv, kv, jnp.array([9, 10])).compile().memory_analysis()
    assert analysis is not None
    assert analysis.alias_size_in_bytes == pool.nbytes


@both_dtypes
def test_rope_write_kv_stores_what_it_rotated(dtype):
    pool, qkv = _pool(dtype, head_dim=16), 3 * _normal(5, 8 * 16, dtype=jnp.bfloat16)
    cos, sin = _normal(5, 8, seed=1), _normal(5, 8, seed=2)
    slots = jnp.arange(30, 35)
    scales: dict[str, Any] = {"k_scale": 0.5, "v_scale": 0.25}
    new_pool, q = rope_write_kv(pool, qkv, cos, sin, slots, num_heads=4, **scales)
    heads = jnp.split(qkv.reshape(5, 8, 16), [4, 6], axis=1)
    expected = write_kv(pool, rotate(heads[1], cos, sin), heads[2], slots, **scales)
    assert np.asarray(expected, np.float32).any()
    for x, y in ((new_pool, expected), (q, rotate(heads[0], cos, sin))):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))
    # In parts, the dtype of the product that was split cannot be seen.
    parts = jnp.stack([qkv.astype(jnp.float32), jnp.zeros(qkv.shape)])
    args = (pool, parts, cos, sin, slots)
    from_parts = rope_write_kv(*args, num_heads=4, q_dtype=jnp.bfloat16, **scales)
    assert from_parts[1].dtype == jnp.bfloat16
    np.testing.assert_array_equal(from_parts[0].astype(jnp.float32), new_pool.astype(jnp.float32))


@both_dtypes
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["mixed", "window", "soft_cap", "padded"])
def test_attention_is_that_over_what_elements_stand_for(name, implementation, dtype):
    (case,) = (case for case in CASES if case.name == name)
    arrays = make(case, jnp.float32, pool_dtype=dtype)
    k_scale, v_scale = (
        (jnp.array(K_SCALE), jnp.array(V_SCALE)) if dtype == INT8 else (0.7, jnp.float32(1.3))
    )
    factors = jnp.stack([jnp.broadcast_to(jnp.asarray(x), 2) for x in (k_scale, v_scale)])
    values = arrays["pool"].astype(jnp.float32) * factors[:, :, None, None]
    options = {
        "scale": case.scale,
        "sliding_window": case.sliding_window,
        "soft_cap": case.soft_cap,
    }
    expected = paged_attention(**arrays | {"pool": values}, **options, implementation="reference")
    out = paged_attention(
        **arrays, **options, k_scale=k_scale, v_scale=v_scale, implementation=implementation
    )
    np.testing.assert_allclose(out, expected, atol=TOLERANCE[jnp.float32], rtol=0)
    without = paged_attention(**arrays, **options, implementation=implementation)
    assert np.abs(without - expected).max() > 0.01, "scales count"


@both_dtypes
def test_bfloat16_queries_over_eight_bits(dtype):
    case = Case(name="b", query_lens=(1, 20), seq_lens=(90, 40))
    arrays = make(case, jnp.bfloat16, pool_dtype=dtype)
    scales: dict[str, Any] = {"k_scale": jnp.array(K_SCALE), "v_scale": jnp.array(V_SCALE)}
    out = paged_attention(**arrays, **scales, implementation="xla")
    assert out.dtype == jnp.bfloat16
    exact = arrays | {"q": arrays["q"].astype(jnp.float32)}
    expected = paged_attention(**exact, **scales, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=TOLERANCE[jnp.bfloat16], rtol=0)


@both_dtypes
def test_a_block_id_outside_the_pool_shows(dtype):
    case = Case(name="bad", query_lens=(1, 1), seq_lens=(20, 20))
    arrays = make(case, jnp.float32, pool_dtype=dtype)
    num_blocks = arrays["pool"].shape[0]
    arrays["block_tables"] = arrays["block_tables"].at[0, 0].set(num_blocks)
    out = paged_attention(**arrays, implementation="xla")
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


@both_dtypes
def test_the_tpu_kernel_equals_the_reference(dtype):
    # Decodes, a chunk, tiles of two blocks; K and V beside each other for one of the types.
    case = Case(
        name="tpu",
        query_lens=(1, 9, 1),
        seq_lens=(33, 40, 100),
        head_dim=64 if dtype == FP8 else 128,
        num_heads=6,
        num_kv_heads=3,
        block_size=32,
        sliding_window=50,
    )
    layout = "merged" if dtype == FP8 else "split"
    arrays = make(case, jnp.bfloat16, pool_dtype=dtype, layout=layout)
    scale = 0.1 if dtype == FP8 else 0.003
    options = {"scale": scale, "sliding_window": case.sliding_window}
    exact = arrays | {"q": arrays["q"].astype(jnp.float32)}
    expected = reference.paged_attention(**exact, **options)
    sizes = mosaic_tpu.TileSizes(kv_bytes=2 * KVCacheSpec.of(arrays["pool"]).block_bytes)
    out = mosaic_tpu.paged_attention(**arrays, **options, sizes=sizes, interpret=tpu_interpreter())
    assert_no_races()
    # Elements of an int8 pool are thirty times as large as what tolerances are for.
    unit = 30 if dtype == INT8 else 1
    out = np.asarray(out, np.float32)
    np.testing.assert_allclose(out / unit, expected / unit, atol=TOLERANCE[jnp.bfloat16], rtol=0)


@both_dtypes
def test_the_tpu_kernels_that_write_equal_xla(dtype):
    pool = write_kv(
        _pool(dtype), 20 * _normal(192, 2, 128), 20 * _normal(192, 2, 128, seed=1), jnp.arange(192)
    )
    k, v = (jnp.rint(9 * _normal(5, 2, 128, seed=s)).astype(dtype) for s in (2, 3))
    slots = jnp.array([31, 32, -1, 100, 191], jnp.int32)
    src, dst = jnp.array([1, 2, 5], jnp.int32), jnp.array([2, 1, 6], jnp.int32)
    interpret = tpu_interpreter()
    for out, expected in (
        (
            write_kv_mosaic_tpu.write_kv(pool, k, v, slots, interpret=interpret),
            write_kv(pool, k, v, slots, implementation="xla"),
        ),
        (
            copy_blocks_mosaic_tpu.copy_blocks(pool, src, dst, interpret=interpret),
            copy_blocks(pool, src, dst, implementation="xla"),
        ),
    ):
        assert_no_races()
        np.testing.assert_array_equal(out.astype(jnp.float32), expected.astype(jnp.float32))
        assert (np.asarray(out, np.float32) != np.asarray(pool, np.float32)).any()


@both_dtypes
def test_tpu_kernels_want_blocks_of_whole_tiles(dtype):
    def reasons(block_size):
        spec = KVCacheSpec(block_size=block_size, num_kv_heads=8, head_dim=128, dtype=dtype)
        return mosaic_tpu.unsupported_reasons(32, spec)

    assert reasons(32) == []
    assert reasons(16) == ["needs blocks of a multiple of 32 tokens, got 16"]


@both_dtypes
def test_gpu_kernels_refuse_them(monkeypatch, dtype):
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    monkeypatch.setattr(mosaic_gpu, "device_reasons", tuple)
    arrays = make(Case(name="g", query_lens=(1,), seq_lens=(9,)), jnp.bfloat16, pool_dtype=dtype)
    kv = jnp.zeros((1, 2, 64), jnp.bfloat16)
    message = f"bfloat16 or float16, got {dtype}"
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(**arrays, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=message):
        write_kv(arrays["pool"], kv, kv, jnp.array([9]), implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("pool_dtype", "scales", "message"),
    [
        (jnp.float32, {"k_scale": 1.0}, "k_scale is for pools of 8 bits, got one of float32"),
        (INT8, {"v_scale": 0.0}, "v_scale must be positive, got 0.0"),
        (INT8, {"k_scale": jnp.ones(3)}, "k_scale must be a number or [num_kv_heads]"),
    ],
)
def test_scales_that_are_refused(pool_dtype, scales, message):
    case = Case(name="s", query_lens=(1,), seq_lens=(9,))
    arrays = make(case, jnp.float32, pool_dtype=pool_dtype)
    kv = jnp.zeros((1, 2, 64))
    with pytest.raises(ValueError, match=re.escape(message)):
        paged_attention(**arrays, **scales)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_kv(arrays["pool"], kv, kv, jnp.array([9]), **scales)
