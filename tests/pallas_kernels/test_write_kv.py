import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import require_gpu_interpreter

from jpaged.pallas_kernels import write_kv


def _pool(num_blocks=5, block_size=8):
    return jnp.zeros((num_blocks, 2, 3, block_size, 16))


def _kv(num_tokens, seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.standard_normal((num_tokens, 3, 16)), jnp.float32) for _ in range(2))


def test_each_token_lands_in_its_slot_and_nothing_else_changes():
    k, v = _kv(4)
    slots = [9, 39, 16, 23]
    pool = np.array(write_kv(_pool(), k, v, jnp.array(slots)))
    for token, slot in enumerate(slots):
        block, offset = divmod(slot, 8)
        np.testing.assert_array_equal(pool[block, 0, :, offset], k[token])
        np.testing.assert_array_equal(pool[block, 1, :, offset], v[token])
        pool[block, :, :, offset] = 0
    assert not pool.any()


@pytest.mark.parametrize("slot", [-1, 40, 10**9])
def test_a_slot_outside_the_pool_is_dropped(slot):
    k, v = _kv(1)
    assert not np.asarray(write_kv(_pool(), k, v, jnp.array([slot]))).any()


def test_is_in_place_when_donated():
    k, v = _kv(2)
    pool = _pool(num_blocks=64)
    compiled = jax.jit(write_kv, donate_argnums=0).lower(pool, k, v, jnp.array([9, 10])).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.alias_size_in_bytes == pool.nbytes
    assert analysis.temp_size_in_bytes < pool.nbytes // 8


@pytest.mark.parametrize(
    ("k_shape", "v_shape", "num_slots", "dtype", "message"),
    [
        ((2, 3, 16), (3, 3, 16), 2, jnp.float32, "k and v must be"),
        ((2, 4, 16), (2, 4, 16), 2, jnp.float32, "k and v must be"),
        ((2, 3, 16), (2, 3, 16), 3, jnp.float32, "slot_mapping must be"),
        ((2, 3, 16), (2, 3, 16), 2, jnp.bfloat16, "must have the pool's dtype"),
    ],
)
def test_refuses(k_shape, v_shape, num_slots, dtype, message):
    with pytest.raises(ValueError, match=message):
        write_kv(
            _pool(), jnp.zeros(k_shape, dtype), jnp.zeros(v_shape, dtype), jnp.zeros(num_slots, int)
        )


@pytest.fixture
def kernel():
    require_gpu_interpreter()
    from jpaged.pallas_kernels import write_kv_mosaic_gpu

    return write_kv_mosaic_gpu


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "dtype"),
    [(8, 128, "bfloat16"), (3, 64, "bfloat16"), (5, 80, "float16"), (1, 96, "bfloat16")],
)
def test_mosaic_gpu_equals_xla(kernel, num_kv_heads, head_dim, dtype):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.dtype(dtype))

    pool = normal(5, 2, num_kv_heads, 8, head_dim)
    k, v = normal(6, num_kv_heads, head_dim), normal(6, num_kv_heads, head_dim)
    slots = jnp.array([9, -1, 39, 40, 16, 0], jnp.int32)
    expected = write_kv(pool, k, v, slots, implementation="xla")
    actual = kernel.write_kv(pool, k, v, slots, interpret=True)
    np.testing.assert_array_equal(actual.astype(jnp.float32), expected.astype(jnp.float32))


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(8, 128), (40, 256), (3, 64), (1, 80)])
def test_mosaic_gpu_lowers_for_cuda_in_place(kernel, num_kv_heads, head_dim):
    # More elements than 32 bits can count.
    pool = jax.ShapeDtypeStruct((200_000, 2, num_kv_heads, 128, head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((256, num_kv_heads, head_dim), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((256,), jnp.int32)
    step = jax.jit(kernel.write_kv, donate_argnums=0)
    text = step.trace(pool, kv, kv, slots).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert "output_operand_alias" in text


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="it can run here")
def test_mosaic_gpu_asked_for_where_it_cannot_run():
    k, v = _kv(2)
    with pytest.raises(NotImplementedError, match="mosaic_gpu cannot run here"):
        write_kv(_pool(), k, v, jnp.array([9, 10]), implementation="mosaic_gpu")
