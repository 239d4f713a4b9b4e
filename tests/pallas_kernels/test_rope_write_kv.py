import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import require_gpu_interpreter

from jpaged.pallas_kernels import write_kv
from jpaged.pallas_kernels.rope_write_kv import rope_write_kv

NUM_BLOCKS, BLOCK_SIZE = 5, 8


def _case(num_tokens, num_heads, num_kv_heads, head_dim, *, num_parts=0, dtype=jnp.float32):
    """Pool, qkv, cos, sin and slots: two outside the pool, the others all different."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    size = (num_heads + 2 * num_kv_heads) * head_dim
    parts = (num_parts,) if num_parts else ()
    qkv = normal(*parts, num_tokens, size, dtype=jnp.float32 if num_parts else dtype)
    angles = rng.standard_normal((num_tokens, head_dim // 2))
    num_slots = NUM_BLOCKS * BLOCK_SIZE
    slots = np.concatenate([rng.permutation(num_slots), np.zeros(num_tokens)])[:num_tokens]
    slots[:2] = [-1, num_slots][:num_tokens]
    return (
        normal(NUM_BLOCKS, 2, num_kv_heads, BLOCK_SIZE, head_dim),
        qkv,
        jnp.asarray(np.cos(angles), jnp.float32),
        jnp.asarray(np.sin(angles), jnp.float32),
        jnp.asarray(slots, jnp.int32),
    )


def test_xla_rotates_and_writes():
    pool, qkv, cos, sin, slots = _case(6, 4, 2, 16)
    new_pool, q = rope_write_kv(pool, qkv, cos, sin, slots, num_heads=4, implementation="xla")
    heads = np.asarray(qkv, np.float64).reshape(6, 8, 16)
    pairs = heads[..., :8] + 1j * heads[..., 8:]
    pairs = pairs * (np.asarray(cos) + 1j * np.asarray(sin))[:, None]
    rotated = np.concatenate([pairs.real, pairs.imag], axis=-1)
    np.testing.assert_allclose(q, rotated[:, :4], rtol=1e-5, atol=1e-5)
    expected = np.array(pool)
    for token, slot in enumerate(slots.tolist()):
        if 0 <= slot < NUM_BLOCKS * BLOCK_SIZE:
            block, offset = divmod(slot, BLOCK_SIZE)
            expected[block, 0, :, offset] = rotated[token, 4:6]
            expected[block, 1, :, offset] = heads[token, 6:]
    np.testing.assert_allclose(new_pool, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_parts", [0, 3])
def test_is_what_the_models_compute(num_parts):
    rope = pytest.importorskip("jpaged.models.rope")
    pool, qkv, cos, sin, slots = _case(6, 4, 2, 16, num_parts=num_parts, dtype=jnp.bfloat16)
    new_pool, q = rope_write_kv(pool, qkv, cos, sin, slots, num_heads=4, implementation="xla")
    if num_parts:
        qkv = ((qkv[0] + qkv[1]) + qkv[2]).astype(jnp.bfloat16)
    heads = jnp.split(qkv.reshape(6, 8, 16), [4, 6], axis=1)
    angles = rope.Rope(cos, sin)
    expected = write_kv(pool, rope.rotate(heads[1], angles), heads[2], slots)
    for x, y in ((q, rope.rotate(heads[0], angles)), (new_pool, expected)):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))


def test_xla_is_in_place_when_donated():
    pool, *others = _case(3, 4, 2, 64)
    pool = jnp.zeros((256, *pool.shape[1:]))
    step = jax.jit(rope_write_kv, static_argnames=("num_heads", "implementation"), donate_argnums=0)
    compiled = step.lower(pool, *others, num_heads=4, implementation="xla").compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.alias_size_in_bytes == pool.nbytes
    assert analysis.temp_size_in_bytes < pool.nbytes // 8


@pytest.mark.parametrize(
    ("changed", "num_heads", "message"),
    [
        ({}, 3, "num_heads must be a multiple"),
        ({"pool": ((5, 3, 2, 8, 16), jnp.bfloat16)}, 4, "pool must be"),
        ({"qkv": ((3, 96), jnp.bfloat16)}, 4, "qkv must be"),
        ({"qkv": ((0, 3, 128), jnp.float32)}, 4, "qkv must be"),
        ({"qkv": ((3, 128), jnp.float32)}, 4, "qkv of 2 axes must be bfloat16"),
        ({"qkv": ((2, 3, 128), jnp.bfloat16)}, 4, "qkv of 3 axes must be float32"),
        ({"cos": ((3, 16), jnp.float32)}, 4, "cos and sin must be"),
        ({"sin": ((3, 8), jnp.bfloat16)}, 4, "cos and sin must be float32"),
        ({"slots": ((4,), jnp.int32)}, 4, "slot_mapping must be"),
    ],
)
def test_refuses(changed, num_heads, message):
    shapes = {
        "pool": ((5, 2, 2, 8, 16), jnp.bfloat16),
        "qkv": ((3, 128), jnp.bfloat16),
        "cos": ((3, 8), jnp.float32),
        "sin": ((3, 8), jnp.float32),
        "slots": ((3,), jnp.int32),
    }
    arguments = [jnp.zeros(*shape) for shape in (shapes | changed).values()]
    with pytest.raises(ValueError, match=message):
        rope_write_kv(*arguments, num_heads=num_heads)


@pytest.fixture
def kernel():
    require_gpu_interpreter()
    from jpaged.pallas_kernels import rope_write_kv_mosaic_gpu

    return rope_write_kv_mosaic_gpu


# Heads that fill layouts evenly; that leave an overlapping tile; that are fewer than the threads;
# a token's heads in one program (133 tokens) and in several.
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "num_parts", "dtype"),
    [
        (4, 8, 4, 64, 0, "bfloat16"),
        (4, 8, 1, 128, 2, "bfloat16"),
        (3, 10, 5, 80, 0, "float16"),
        (3, 6, 3, 96, 2, "bfloat16"),
        (3, 2, 2, 256, 0, "bfloat16"),
        (133, 9, 3, 64, 0, "bfloat16"),
    ],
)
def test_mosaic_gpu_equals_xla(
    kernel, num_tokens, num_heads, num_kv_heads, head_dim, num_parts, dtype
):
    case = _case(
        num_tokens, num_heads, num_kv_heads, head_dim, num_parts=num_parts, dtype=jnp.dtype(dtype)
    )
    if num_tokens > NUM_BLOCKS * BLOCK_SIZE:  # these would all be written to slot 0, in any order
        slots = np.array(case[-1])
        slots[NUM_BLOCKS * BLOCK_SIZE :] = -1
        case = (*case[:-1], jnp.asarray(slots))
    expected = rope_write_kv(*case, num_heads=num_heads, implementation="xla")
    actual = kernel.rope_write_kv(*case, num_heads=num_heads, interpret=True)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(
            x.astype(jnp.float32), y.astype(jnp.float32), rtol=1e-2, atol=1e-3
        )


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(32, 8, 128), (14, 2, 64), (9, 3, 64), (32, 32, 80), (8, 1, 96), (16, 16, 256), (64, 8, 128)],
)
@pytest.mark.parametrize(("num_tokens", "num_parts"), [(1, 4), (64, 2), (4096, 0)])
def test_mosaic_gpu_lowers_for_cuda_in_place(
    kernel, num_heads, num_kv_heads, head_dim, num_tokens, num_parts
):
    _, *others = jax.eval_shape(
        lambda: _case(
            num_tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            num_parts=num_parts,
            dtype=jnp.bfloat16,
        )
    )
    # More elements than 32 bits can count.
    pool = jax.ShapeDtypeStruct((200_000, 2, num_kv_heads, 128, head_dim), jnp.bfloat16)
    step = jax.jit(lambda *a: kernel.rope_write_kv(*a, num_heads=num_heads), donate_argnums=0)
    text = step.trace(pool, *others).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert "output_operand_alias" in text


def test_mosaic_gpu_says_what_it_cannot_serve(kernel):
    def reasons(head_dim, dtype, num_tokens=4):
        return kernel.unsupported_reasons(
            jax.ShapeDtypeStruct((9, 2, 8, 16, head_dim), dtype), num_tokens
        )

    assert reasons(128, jnp.float16) == []
    assert "needs bfloat16 or float16" in reasons(128, jnp.float32)[0]
    assert "head_dim to be a multiple of 16" in reasons(72, jnp.bfloat16)[0]
    assert "up to 256" in reasons(512, jnp.bfloat16)[0]
    assert reasons(128, jnp.bfloat16, num_tokens=0) == ["nothing to write"]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="it can run here")
def test_mosaic_gpu_asked_for_where_it_cannot_run():
    case = _case(2, 4, 2, 64, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="mosaic_gpu cannot run here"):
        rope_write_kv(*case, num_heads=4, implementation="mosaic_gpu")
