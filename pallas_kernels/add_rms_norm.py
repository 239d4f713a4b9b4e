"""The residual stream's addition and the norm behind it, in one pass over the rows."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpaged.pallas_kernels import registry
from jpaged.pallas_kernels.mosaic_gpu import device_reasons


def merge_partials(x: Array, dtype: jax.typing.DTypeLike) -> Array:
    """The sum over the first axis of f32 partial sums, in order, rounded once to `dtype`."""
    return functools.reduce(jnp.add, [x[i] for i in range(x.shape[0])]).astype(dtype)


def rms_norm(
    x: Float[Array, "*rows size"], weight: Float[Array, " size"], eps: float
) -> Float[Array, "*rows size"]:
    """Rows over their root mean square, which is taken in float32, times `weight`; x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def add_rms_norm(
    residual: Float[Array, "num_rows size"],
    delta: Float[Array, "*num_parts num_rows size"] | None,
    weight: Float[Array, " size"],
    eps: float,
    *,
    implementation: registry.Implementation | None = None,
) -> tuple[Float[Array, "num_rows size"], Float[Array, "num_rows size"]]:
    """`residual + delta`, and its root mean square norm times `weight`, both in residual's dtype.

    The mean is taken in float32 over the rounded sum, and the normalised row is rounded before it
    is multiplied by the weight.

    Args:
        residual: The stream.
        delta: What is added to it: [num_rows, size] in residual's dtype; or the partial sums
            f32[num_parts, num_rows, size] of a matmul that was split over its contraction, which
            are added in order and rounded as the unsplit matmul's result; or None for the norm
            alone.
        weight: Weight of the norm, in residual's dtype.
        eps: Added to the mean square.
        implementation: A name never falls back; None chooses.

    Raises:
        ValueError: Shapes or dtypes contradict each other.
        NotImplementedError: The implementation asked for cannot serve the problem.
    """
    _check(residual, delta, weight)

    def mosaic_gpu_reasons() -> list[str]:
        if reasons := list(device_reasons()):
            return reasons
        from jpaged.pallas_kernels import add_rms_norm_mosaic_gpu

        return add_rms_norm_mosaic_gpu.unsupported_reasons(residual)

    name = registry.choose(
        "add_rms_norm", implementation, {"mosaic_gpu": mosaic_gpu_reasons, "xla": list}
    )
    if name == "mosaic_gpu":
        from jpaged.pallas_kernels import add_rms_norm_mosaic_gpu

        return add_rms_norm_mosaic_gpu.add_rms_norm(residual, delta, weight, eps)
    return _xla(residual, delta, weight, eps)


def _xla(residual: Array, delta: Array | None, weight: Array, eps: float) -> tuple[Array, Array]:
    if delta is not None:
        residual = residual + (merge_partials(delta, residual.dtype) if delta.ndim == 3 else delta)
    return residual, rms_norm(residual, weight, eps)


def _check(residual: Array, delta: Array | None, weight: Array) -> None:
    if residual.ndim != 2 or weight.shape != residual.shape[1:]:
        raise ValueError(
            "residual must be [num_rows, size] and weight [size], "
            f"got {residual.shape=}, {weight.shape=}"
        )
    if weight.dtype != residual.dtype:
        raise ValueError(
            f"weight must have residual's dtype, got {weight.dtype} and {residual.dtype}"
        )
    if delta is None:
        return
    if delta.ndim not in (2, 3) or delta.shape[-2:] != residual.shape or 0 in delta.shape[:-2]:
        raise ValueError(
            "delta must be [num_rows, size] or [num_parts, num_rows, size] of residual, "
            f"got {delta.shape=}, {residual.shape=}"
        )
    expected = residual.dtype if delta.ndim == 2 else jnp.dtype(jnp.float32)
    if delta.dtype != expected:
        raise ValueError(f"delta of {delta.ndim} axes must be {expected}, got {delta.dtype}")
