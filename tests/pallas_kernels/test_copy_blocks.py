import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.pallas_kernels import KVCacheSpec, copy_blocks


def _pool():
    return jnp.arange(6, dtype=jnp.float32)[:, None, None, None, None] * jnp.ones((1, 2, 1, 8, 4))


def _ids(pool):
    return np.asarray(pool)[:, 0, 0, 0, 0].astype(int).tolist()


def test_all_sources_are_read_before_any_destination_is_written():
    pool = copy_blocks(_pool(), jnp.array([1, 2, 0, 0]), jnp.array([2, 3, 0, 0]))
    assert _ids(pool) == [0, 1, 1, 2, 4, 5]


@pytest.mark.parametrize(("src", "dst"), [(9, 2), (-1, 2), (2, 9), (2, -1)])
def test_a_pair_outside_the_pool_is_dropped(src, dst):
    assert _ids(copy_blocks(_pool(), jnp.array([src]), jnp.array([dst]))) == [0, 1, 2, 3, 4, 5]


def test_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="src and dst must be"):
        copy_blocks(_pool(), jnp.array([1]), jnp.array([1, 2]))


def test_layout_counts_the_bytes_it_allocates():
    spec = KVCacheSpec(block_size=16, num_kv_heads=3, head_dim=64, dtype=jnp.dtype(jnp.bfloat16))
    assert spec.allocate(7).nbytes == 7 * spec.block_bytes


def test_layout_refuses_odd_block_sizes():
    with pytest.raises(ValueError, match="block_size must be one of"):
        KVCacheSpec(block_size=12, num_kv_heads=3, head_dim=64, dtype=jnp.dtype(jnp.float32))
