import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.pallas_kernels import (
    KVCacheSpec,
    copy_blocks,
    mosaic_gpu,
    mosaic_tpu,
    paged_attention,
    preferred_layout,
    rope_write_kv,
    write_kv,
)
from jpaged.pallas_kernels.kv_cache_layout import split_blocks
from jpaged.pallas_kernels.paged_attention.cases import Case, make


def _spec(**changes):
    options = {"block_size": 16, "num_kv_heads": 3, "head_dim": 64, "dtype": jnp.dtype("float32")}
    return KVCacheSpec(**(options | changes))


@pytest.mark.parametrize("layout", ["split", "merged"])
def test_counts_the_bytes_it_allocates_and_is_what_its_pool_says(layout):
    spec = _spec(layout=layout)
    pool = spec.allocate(7)
    assert pool.nbytes == 7 * spec.block_bytes
    assert KVCacheSpec.of(pool) == spec


def test_refuses_odd_block_sizes():
    with pytest.raises(ValueError, match="block_size must be one of"):
        _spec(block_size=12)


@pytest.mark.parametrize("shape", [(4, 2, 3, 16), (4, 3, 3, 16, 64), (4, 1, 3, 16, 63)])
def test_refuses_what_is_no_pool(shape):
    with pytest.raises(ValueError, match="pool must be"):
        KVCacheSpec.of(jnp.zeros(shape))


def test_only_tpus_prefer_the_merged_layout(monkeypatch):
    assert preferred_layout(64) == "split"
    monkeypatch.setattr(mosaic_tpu, "device_reasons", tuple)
    assert [preferred_layout(dim) for dim in (32, 64, 80, 128)] == [
        "split",
        "merged",
        "split",
        "split",
    ]


def test_both_layouts_hold_the_same_after_writes_and_copies():
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((5, 3, 64)), jnp.float32) for _ in range(2))
    qkv = jnp.asarray(rng.standard_normal((5, 15 * 64)), jnp.float32)
    cos, sin = (jnp.asarray(rng.standard_normal((5, 32)), jnp.float32) for _ in range(2))
    slots = jnp.array([3, -1, 65, 40, 10**6])
    pools, queries = [], []
    for layout in ("split", "merged"):
        pool = write_kv(_spec(layout=layout).allocate(6), k, v, slots)
        pool, q = rope_write_kv(pool, qkv, cos, sin, slots + 1, num_heads=9)
        pools.append(copy_blocks(pool, jnp.array([4, 2]), jnp.array([2, 5])))
        queries.append(q)
    assert np.count_nonzero(pools[0]) == 2 * 64 * 3 * 9, "3 + 4 tokens, and 2 by copying"
    np.testing.assert_array_equal(split_blocks(pools[1]), pools[0])
    np.testing.assert_array_equal(*queries)


def test_gpu_kernels_say_that_they_do_not_read_the_merged_layout(monkeypatch):
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    monkeypatch.setattr(mosaic_gpu, "device_reasons", tuple)
    arrays = make(Case(name="m", query_lens=(1,), seq_lens=(9,)), jnp.bfloat16, layout="merged")
    kv = jnp.zeros((1, 2, 64), jnp.bfloat16)
    message = "needs the split layout, got merged"
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(**arrays, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=message):
        write_kv(arrays["pool"], kv, kv, jnp.array([9]), implementation="mosaic_gpu")
    assert np.isfinite(paged_attention(**arrays).astype(jnp.float32)).all(), "XLA serves it"
