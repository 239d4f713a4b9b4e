import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
