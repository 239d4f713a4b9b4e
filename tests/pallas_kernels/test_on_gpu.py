"""Every kernel compiled, on a GPU that runs it, against XLA or float32: `pytest -m gpu`."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_draws import TILE, check_draws, draw_case

from jpaged.pallas_kernels import (
    KVCacheSpec,
    add_rms_norm,
    copy_blocks,
    linear,
    paged_attention,
    rope_write_kv,
    write_kv,
)
from jpaged.pallas_kernels import mosaic_gpu as device
from jpaged.pallas_kernels.linear import num_splits
from jpaged.pallas_kernels.paged_attention.cases import Case, make
from jpaged.token_choice import choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        bool(device.device_reasons()), reason="needs a GPU that runs Mosaic kernels"
    ),
]

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
# Of norms: rounded weights of up to 1,500 slots, partial results and outputs.
RELATIVE_ERROR = {BF16: 4e-3, F16: 6e-4}

RAGGED = functools.partial(
    Case,
    query_lens=(1, 1, 70, 5, 1, 300, 1),
    seq_lens=(33, 1300, 70, 400, 16, 700, 7),
    num_padding_tokens=5,
    num_padding_seqs=3,
)
DECODES = functools.partial(
    Case,
    query_lens=(1,) * 6,
    seq_lens=(1, 1500, 15, 16, 17, 700),
    num_padding_tokens=2,
    num_padding_seqs=2,
)
SHAPES: tuple[tuple[int, int, tuple[int, int], dict[str, Any]], ...] = (
    (64, 16, (8, 2), {}),
    (64, 128, (9, 3), {}),
    (80, 16, (8, 8), {}),
    (80, 64, (4, 1), {"sliding_window": 50}),
    (96, 32, (8, 2), {}),
    (96, 128, (8, 8), {"soft_cap": 5.0}),
    (128, 16, (32, 8), {}),
    (128, 16, (32, 8), {"sliding_window": 200}),
    (128, 32, (28, 4), {}),
    (128, 64, (16, 8), {"soft_cap": 20.0, "scale": 0.2}),
    (128, 128, (40, 40), {}),
    (128, 16, (64, 2), {}),
    (256, 16, (8, 4), {}),
    (256, 128, (16, 8), {"sliding_window": 64}),
)
GRID = [
    shape(
        name=f"{shape.keywords['query_lens'][2]}_d{head_dim}_b{block_size}_h{heads[0]}_{heads[1]}",
        head_dim=head_dim,
        block_size=block_size,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        **options,
    )
    for shape, (head_dim, block_size, heads, options) in itertools.product(
        (RAGGED, DECODES), SHAPES
    )
]


def _poison(num_bytes):
    """Leaves NaN in memory that the next call may be given, so that what it misses shows."""
    jax.block_until_ready(jnp.full(num_bytes // 4, jnp.nan, F32)).delete()


def _error(out, expected):
    out, expected = (np.asarray(x, np.float64) for x in (out, expected))
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
def test_attention_equals_the_reference_over_the_grid(case, dtype):
    arrays = make(case, dtype)
    options = {
        "scale": case.scale,
        "sliding_window": case.sliding_window,
        "soft_cap": case.soft_cap,
        "max_query_len": 1 if max(case.query_lens) == 1 else None,
    }
    exact = {k: v.astype(F32) if k in ("q", "pool") else v for k, v in arrays.items()}
    expected = paged_attention(**exact, **options, implementation="reference")
    attend = functools.partial(paged_attention, **options, implementation="mosaic_gpu")
    compiled = jax.jit(attend).lower(**arrays).compile()
    _poison(arrays["q"].nbytes)
    out = compiled(**arrays)
    assert _error(out, expected) < RELATIVE_ERROR[dtype]
    num_real = sum(case.query_lens)
    assert not np.asarray(out[num_real:], np.float32).any(), "rows of padding must be zero"


@pytest.mark.parametrize("window", [None, 5])
def test_a_pool_of_more_than_2_to_the_31_elements(window):
    block_size, num_kv_heads, head_dim, num_blocks = 16, 8, 128, 70_000
    spec = KVCacheSpec(
        block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=jnp.dtype(BF16)
    )
    assert np.prod(spec.shape(num_blocks)) > 2**31
    keys = jax.random.split(jax.random.key(0), 3)
    length = 40
    k, v = (jax.random.normal(key, (length, num_kv_heads, head_dim), BF16) for key in keys[:2])
    q = jax.random.normal(keys[2], (1, 32, head_dim), BF16)
    blocks = np.array([num_blocks - 1, 1, num_blocks - 2], np.int32)
    position = np.arange(length)
    slots = blocks[position // block_size] * block_size + position % block_size
    pool = jax.jit(functools.partial(write_kv, implementation="mosaic_gpu"), donate_argnums=0)(
        spec.allocate(num_blocks), k, v, jnp.asarray(slots, jnp.int32)
    )
    small = write_kv(
        spec.allocate(4),
        k,
        v,
        jnp.asarray(np.array([1, 2, 3])[position // 16] * 16 + position % 16, jnp.int32),
        implementation="xla",
    )
    for i, block in enumerate(blocks):
        np.testing.assert_array_equal(pool[block].astype(F32), small[1 + i].astype(F32))
    rest = jnp.asarray([length], jnp.int32), jnp.asarray([0, 1], jnp.int32)
    attend = functools.partial(paged_attention, sliding_window=window, max_query_len=1)
    out = attend(q, pool, jnp.asarray(blocks[None]), *rest, implementation="mosaic_gpu")
    expected = attend(
        q.astype(F32),
        small.astype(F32),
        jnp.asarray([[1, 2, 3]], jnp.int32),
        *rest,
        implementation="reference",
    )
    assert _error(out, expected) < RELATIVE_ERROR[BF16]


@pytest.mark.parametrize("num_tokens", [1, 64, 700])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "num_parts"),
    [
        (32, 8, 128, 16, 0),
        (32, 8, 128, 16, 4),
        (14, 2, 64, 32, 2),
        (9, 3, 64, 8, 0),
        (8, 8, 80, 16, 0),
        (8, 1, 96, 128, 2),
        (16, 16, 256, 64, 0),
    ],
)
def test_rotation_and_write(num_tokens, num_heads, num_kv_heads, head_dim, block_size, num_parts):
    rng = np.random.default_rng(0)
    num_blocks = num_tokens + 3
    pool = jnp.asarray(
        rng.standard_normal((num_blocks, 2, num_kv_heads, block_size, head_dim)), BF16
    )
    shape = (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    qkv = jnp.asarray(rng.standard_normal((num_parts, *shape) if num_parts else shape))
    qkv = qkv.astype(F32 if num_parts else BF16)
    angles = rng.uniform(0, 7, (num_tokens, head_dim // 2))
    slots = rng.permutation(num_blocks * block_size)[:num_tokens]
    slots[::7] = -1
    args = (pool, qkv, jnp.cos(angles), jnp.sin(angles), jnp.asarray(slots, jnp.int32))
    args = tuple(x.astype(F32) if x.dtype == jnp.float64 else x for x in args)
    ours, xla = (
        jax.jit(functools.partial(rope_write_kv, num_heads=num_heads, implementation=name))(*args)
        for name in ("mosaic_gpu", "xla")
    )
    for one, other in zip(ours, xla, strict=True):
        # A fused multiply-add more or less: half an ulp of values below 8.
        np.testing.assert_allclose(one.astype(F32), other.astype(F32), atol=0.032, rtol=0)


@pytest.mark.parametrize("num_rows", [1, 64, 700])
@pytest.mark.parametrize(
    ("size", "num_parts"), [(4096, 0), (4096, 4), (576, 0), (96, 2), (2880, 0), (16384, 2)]
)
def test_residual_and_norm(num_rows, size, num_parts):
    rng = np.random.default_rng(0)
    residual = jnp.asarray(rng.standard_normal((num_rows, size)), BF16)
    parts = (num_parts, num_rows, size) if num_parts else (num_rows, size)
    delta = jnp.asarray(rng.standard_normal(parts), F32 if num_parts else BF16)
    weight = jnp.asarray(rng.uniform(0.5, 1.5, size), BF16)
    ours, xla = (
        jax.jit(functools.partial(add_rms_norm, eps=1e-5, implementation=name))(
            residual, delta, weight
        )
        for name in ("mosaic_gpu", "xla")
    )
    np.testing.assert_array_equal(ours[0].astype(F32), xla[0].astype(F32))
    # XLA may leave out the rounding before the weight: one ulp of values below 8.
    np.testing.assert_allclose(ours[1].astype(F32), xla[1].astype(F32), atol=0.032, rtol=0)


@pytest.mark.parametrize("num_rows", [3, 64, 700])
@pytest.mark.parametrize("vocab_size", [32000, 128256, 151936])
def test_tokens(num_rows, vocab_size):
    case = draw_case(vocab_size // TILE, num_rows)
    chosen = jax.jit(functools.partial(choose, implementation="mosaic_gpu"))(*case)
    check_draws(*case, chosen)


def test_block_copies_read_before_they_write():
    pool = jax.random.normal(jax.random.key(0), (40, 2, 8, 16, 128), BF16)
    src = jnp.asarray([1, 2, 3, 0, 30, 7], jnp.int32)  # a chain, a ring and the null block
    dst = jnp.asarray([2, 3, 1, 0, 39, 40], jnp.int32)  # and one outside the pool
    ours, xla = (
        jax.jit(functools.partial(copy_blocks, implementation=name))(pool, src, dst)
        for name in ("mosaic_gpu", "xla")
    )
    np.testing.assert_array_equal(ours.astype(F32), xla.astype(F32))


@pytest.mark.parametrize("m", [1, 8, 64, 100, 256])
@pytest.mark.parametrize(
    ("k", "n", "activation"),
    [
        (4096, 6144, None),
        (4096, 4096, None),
        (14336, 4096, None),
        (4096, 28672, "silu_mul"),
        (512, 768, None),
        (4096, 49152, None),
    ],
)
def test_products(m, k, n, activation):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (m, k), BF16)
    w = jax.random.normal(keys[1], (k, n), BF16) * BF16(k**-0.5)
    splits = 1 if activation else num_splits(m, k, n)
    out = linear(x, w, activation=activation, num_splits=splits, implementation="mosaic_gpu")
    again = linear(x, w, activation=activation, num_splits=splits, implementation="mosaic_gpu")
    np.testing.assert_array_equal(out.astype(F32), again.astype(F32))
    whole = out.sum(axis=0) if splits > 1 else out
    exact = linear(x.astype(F32), w.astype(F32), activation=activation, implementation="xla")
    assert _error(whole, exact) < RELATIVE_ERROR[BF16]
