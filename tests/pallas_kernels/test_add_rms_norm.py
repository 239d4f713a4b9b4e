from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import require_gpu_interpreter

from jpaged.pallas_kernels.add_rms_norm import add_rms_norm

EPS = 1e-5


def _case(num_rows, size, num_parts, dtype, seed=0) -> tuple[Any, Any, Any]:
    """Residual, delta and weight; `num_parts` is None for no delta, 0 for one of two axes."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    delta = None
    if num_parts is not None:
        parts = (num_parts, num_rows, size) if num_parts else (num_rows, size)
        delta = normal(*parts, dtype=jnp.float32 if num_parts else dtype)
    return normal(num_rows, size), delta, normal(size)


@pytest.mark.parametrize("num_parts", [None, 0, 1, 3])
def test_xla_adds_and_normalises_in_float32(num_parts):
    residual, delta, weight = _case(5, 48, num_parts, jnp.float32)
    stream, normed = add_rms_norm(residual, delta, weight, EPS, implementation="xla")
    expected = np.asarray(residual, np.float64)
    if delta is not None:
        expected = expected + np.asarray(delta, np.float64).reshape(-1, 5, 48).sum(0)
    np.testing.assert_allclose(stream, expected, rtol=1e-5, atol=1e-5)
    scale = np.sqrt((expected**2).mean(-1, keepdims=True) + EPS)
    np.testing.assert_allclose(normed, expected / scale * np.asarray(weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_partial_sums_are_rounded_as_the_unsplit_matmul(dtype):
    residual, parts, weight = _case(4, 64, 4, dtype)
    delta = (((parts[0] + parts[1]) + parts[2]) + parts[3]).astype(dtype)
    for split, whole in zip(
        add_rms_norm(residual, parts, weight, EPS, implementation="xla"),
        add_rms_norm(residual, delta, weight, EPS, implementation="xla"),
        strict=True,
    ):
        assert split.dtype == dtype
        np.testing.assert_array_equal(split.astype(jnp.float32), whole.astype(jnp.float32))


def test_without_delta_the_stream_is_unchanged():
    residual, _, weight = _case(3, 32, None, jnp.bfloat16)
    assert add_rms_norm(residual, None, weight, EPS, implementation="xla")[0] is residual


def test_is_the_norm_of_the_models():
    layers = pytest.importorskip("jpaged.models.layers")
    residual, delta, weight = _case(3, 32, 0, jnp.bfloat16)
    norm = layers.RMSNorm(32, eps=EPS, dtype=jnp.bfloat16)
    norm.weight[...] = weight
    stream, normed = add_rms_norm(residual, delta, weight, EPS, implementation="xla")
    np.testing.assert_array_equal(
        stream.astype(jnp.float32), (residual + delta).astype(jnp.float32)
    )
    np.testing.assert_array_equal(normed.astype(jnp.float32), norm(stream).astype(jnp.float32))


@pytest.mark.parametrize(
    ("residual", "delta", "weight", "message"),
    [
        ((2, 3, 16), None, (16,), "residual must be"),
        ((2, 16), None, (8,), "residual must be"),
        ((2, 16), (3, 16), (16,), "delta must be"),
        ((2, 16), (0, 2, 16), (16,), "delta must be"),
        ((2, 16), (4, 2, 16), (16,), "delta of 3 axes must be float32"),
    ],
)
def test_refuses_shapes(residual, delta, weight, message):
    zeros: list[Any] = [x and jnp.zeros(x, jnp.bfloat16) for x in (residual, delta, weight)]
    with pytest.raises(ValueError, match=message):
        add_rms_norm(zeros[0], zeros[1], zeros[2], EPS)


def test_refuses_dtypes():
    residual, delta, weight = _case(2, 16, 0, jnp.float32)
    with pytest.raises(ValueError, match="weight must have"):
        add_rms_norm(residual, None, weight.astype(jnp.bfloat16), EPS)
    with pytest.raises(ValueError, match="delta of 2 axes must be float32"):
        add_rms_norm(residual, delta.astype(jnp.bfloat16), weight, EPS)


@pytest.fixture
def kernel():
    require_gpu_interpreter()
    from jpaged.pallas_kernels import add_rms_norm_mosaic_gpu

    return add_rms_norm_mosaic_gpu


# 16-byte, 8-byte and single loads, and a row that every warp holds.
@pytest.mark.parametrize("size", [1024, 512, 384, 96])
@pytest.mark.parametrize(
    ("num_parts", "dtype"), [(None, "bfloat16"), (0, "float16"), (3, "bfloat16")]
)
def test_mosaic_gpu_equals_xla(kernel, size, num_parts, dtype):
    case = _case(3, size, num_parts, jnp.dtype(dtype))
    expected = add_rms_norm(*case, EPS, implementation="xla")
    for x, y in zip(kernel.add_rms_norm(*case, EPS, interpret=True), expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(
            x.astype(jnp.float32), y.astype(jnp.float32), rtol=2e-2, atol=1e-3
        )


@pytest.mark.parametrize("size", [576, 3584, 4096, 16384])
@pytest.mark.parametrize("num_parts", [None, 0, 8])
def test_mosaic_gpu_lowers_for_cuda(kernel, size, num_parts):
    residual, delta, weight = jax.eval_shape(lambda: _case(256, size, num_parts, jnp.bfloat16))
    traced = jax.jit(lambda *a: kernel.add_rms_norm(*a, EPS)).trace(residual, delta, weight)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


def test_mosaic_gpu_says_what_it_cannot_serve(kernel):
    def reasons(num_rows, size, dtype):
        residual = jax.ShapeDtypeStruct((num_rows, size), dtype)
        return kernel.unsupported_reasons(residual)

    assert reasons(4, 4096, jnp.float16) == []
    assert "needs bfloat16 or float16" in reasons(4, 4096, jnp.float32)[0]
    assert "multiple of 32" in reasons(4, 100, jnp.bfloat16)[0]
    assert "up to 16384" in reasons(4, 32768, jnp.bfloat16)[0]
    assert reasons(0, 4096, jnp.bfloat16) == ["no rows"]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="it can run here")
def test_mosaic_gpu_asked_for_where_it_cannot_run():
    case = _case(2, 128, None, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="mosaic_gpu cannot run here"):
        add_rms_norm(*case, EPS, implementation="mosaic_gpu")
