import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import require_gpu_interpreter

from jpaged.pallas_kernels import copy_blocks


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


@pytest.fixture
def kernel():
    require_gpu_interpreter()
    from jpaged.pallas_kernels import copy_blocks_mosaic_gpu

    return copy_blocks_mosaic_gpu


def test_mosaic_gpu_equals_xla(kernel):
    rng = np.random.default_rng(0)
    pool = jnp.asarray(rng.standard_normal((7, 2, 1, 8, 64)), jnp.bfloat16)
    # A cycle, a chain, ids outside the pool, padding.
    src = jnp.array([1, 2, 3, 4, 9, -1, 4, 5, 0, 0], jnp.int32)
    dst = jnp.array([2, 3, 1, 6, 4, 5, -1, 7, 0, 0], jnp.int32)
    expected = copy_blocks(pool, src, dst, implementation="xla")
    actual = kernel.copy_blocks(pool, src, dst, interpret=True)
    np.testing.assert_array_equal(actual.astype(jnp.float32), expected.astype(jnp.float32))


@pytest.mark.parametrize("num_copies", [1, 64, 256, 1024])
@pytest.mark.parametrize("shape", [(8, 16, 128), (1, 8, 80), (3, 16, 96), (8, 128, 256)])
def test_mosaic_gpu_lowers_for_cuda_in_place(kernel, num_copies, shape):
    pool = jax.ShapeDtypeStruct((200_000, 2, *shape), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((num_copies,), jnp.int32)
    step = jax.jit(kernel.copy_blocks, donate_argnums=0)
    text = step.trace(pool, ids, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert "output_operand_alias" in text


def test_mosaic_gpu_says_what_it_cannot_serve(kernel):
    def reasons(num_copies, head_dim=128, dtype=jnp.bfloat16):
        pool = jax.ShapeDtypeStruct((9, 2, 1, 8, head_dim), dtype)
        return kernel.unsupported_reasons(pool, num_copies)

    assert reasons(1024) == []
    assert "up to 1024 copies" in reasons(1025)[0]
    assert "needs bfloat16 or float16" in reasons(4, dtype=jnp.float32)[0]
    assert "multiple of 256 elements" in reasons(4, head_dim=40)[0]
    assert reasons(0) == ["nothing to copy"]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="it can run here")
def test_mosaic_gpu_asked_for_where_it_cannot_run():
    with pytest.raises(NotImplementedError, match="mosaic_gpu cannot run here"):
        copy_blocks(_pool(), jnp.array([1]), jnp.array([2]), implementation="mosaic_gpu")
