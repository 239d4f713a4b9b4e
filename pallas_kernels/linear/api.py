"""The public matrix product of a decode step: checks, choice of implementation, call."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpaged.pallas_kernels import registry
from jpaged.pallas_kernels.mosaic_gpu import device_reasons

Activation = Literal["silu_mul"] | None


def unsupported_reasons(
    m: int,
    k: int,
    n: int,
    dtype: jax.typing.DTypeLike,
    *,
    activation: Activation = None,
    num_splits: int = 1,
) -> list[str]:
    """Why the Mosaic GPU kernel cannot serve a problem on this device; empty if it can."""
    if reasons := list(device_reasons()):
        return reasons
    # Pallas is imported where a kernel runs only: it takes a CPU 0.2 s.
    from jpaged.pallas_kernels.linear import mosaic_gpu

    return mosaic_gpu.unsupported_reasons(
        m, k, n, dtype, activation=activation, num_splits=num_splits
    )


def num_splits(
    m: int,
    k: int,
    n: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: registry.Implementation | None = None,
) -> int:
    """The number of partial sums that is fastest for a caller who adds them up on the way.

    Raises:
        NotImplementedError: The implementation asked for cannot serve the problem.
    """
    if _choose(implementation, m, k, n, dtype, None, 1) == "xla":
        return 1
    from jpaged.pallas_kernels.linear import mosaic_gpu

    return mosaic_gpu.choose_config(m, k, n).num_splits


def linear(
    x: Float[Array, "m k"],
    w: Float[Array, "..."],
    *,
    transposed: bool = False,
    activation: Activation = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    num_splits: int = 1,
    implementation: registry.Implementation | None = None,
) -> Float[Array, "..."]:
    """`x @ w`, accumulated in float32.

    The sums do not depend on timing: the same shapes give the same bits.

    Args:
        x: Rows.
        w: `[k, n]`, or `[n, k]` if `transposed`.
        transposed: See `w`.
        activation: `silu_mul`: the first half of the columns are gates, the second half ups, and
            the output is `silu(gate) * up`. The kernel computes it from the float32 sums and
            rounds once; XLA rounds gates and ups to x's dtype first.
        out_dtype: Of the output; x's if None. Partial sums are float32.
        num_splits: With more than one, the output is that many partial sums `[num_splits, m, n]`
            over consecutive parts of the depth; see the function `num_splits`.
        implementation: A name never falls back; None chooses.

    Returns:
        `[m, n]`, `[m, n / 2]` with an activation, or `[num_splits, m, n]`.

    Raises:
        ValueError: Shapes or options contradict each other.
        NotImplementedError: The implementation asked for cannot serve the problem.
    """
    _check(x, w, transposed, activation, out_dtype, num_splits)
    m, k = x.shape
    n = w.shape[0] if transposed else w.shape[1]
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    name = _choose(implementation, m, k, n, x.dtype, activation, num_splits)
    if name == "xla":
        return _xla(x, w, transposed, activation, out_dtype, num_splits)
    from jpaged.pallas_kernels.linear import mosaic_gpu

    config = mosaic_gpu.choose_config(
        m,
        k,
        n,
        activation=activation,
        num_splits=num_splits if num_splits > 1 else None,
        summed_here=num_splits == 1,
    )
    sums = mosaic_gpu.linear(
        x,
        w,
        config=config,
        transposed=transposed,
        activation=activation,
        out_dtype=jnp.float32 if config.num_splits > 1 else out_dtype,
    )
    if num_splits > 1:
        return sums
    return sums[0] if config.num_splits == 1 else jnp.sum(sums, axis=0).astype(out_dtype)


def _choose(
    requested: registry.Implementation | None,
    m: int,
    k: int,
    n: int,
    dtype: jax.typing.DTypeLike,
    activation: Activation,
    num_splits: int,
) -> registry.Implementation:
    def reasons() -> list[str]:
        return unsupported_reasons(m, k, n, dtype, activation=activation, num_splits=num_splits)

    return registry.choose("linear", requested, {"mosaic_gpu": reasons, "xla": list})


def _check(x, w, transposed, activation, out_dtype, num_splits):
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1 if transposed else 0]:
        raise ValueError(
            "x must be [m, k] and w [k, n] (transposed: [n, k]), "
            f"got {x.shape=}, {w.shape=}, {transposed=}"
        )
    if x.dtype != w.dtype:
        raise ValueError(f"x and w must have one dtype, got {x.dtype} and {w.dtype}")
    if activation not in (None, "silu_mul"):
        raise ValueError(f"activation must be None or 'silu_mul', got {activation!r}")
    if activation and w.shape[0 if transposed else 1] % 2:
        raise ValueError(f"silu_mul needs an even number of columns, got {w.shape=}")
    if num_splits < 1 or x.shape[1] % num_splits:
        raise ValueError(f"num_splits must divide the depth {x.shape[1]}, got {num_splits}")
    if num_splits > 1 and activation:
        raise ValueError(f"{activation} needs whole sums, got {num_splits=}")
    if num_splits > 1 and out_dtype not in (None, jnp.float32):
        raise ValueError(f"partial sums are float32, got {out_dtype=}")


def _xla(x, w, transposed, activation, out_dtype, num_splits):
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None

    # A GPU's products are summed in float32 whatever comes out; asked for float32 where the caller
    # wants less, XLA writes that to memory and converts it in a kernel of its own.
    def dot(x, w, dimension_numbers, dtype=jnp.float32):
        return jax.lax.dot_general(
            x, w, dimension_numbers, precision=precision, preferred_element_type=dtype
        )

    depth = 1 if transposed else 0
    if num_splits > 1:
        x = x.reshape(x.shape[0], num_splits, -1)
        w = w.reshape(*w.shape[:depth], num_splits, -1, *w.shape[depth + 1 :])
        return dot(x, w, (((2,), (depth + 1,)), ((1,), (depth,))))
    rounds_once = out_dtype == jnp.float32 or jax.default_backend() != "gpu"
    out = dot(x, w, (((1,), (depth,)), ((), ())), jnp.float32 if rounds_once else x.dtype)
    if activation is None:
        return out.astype(out_dtype)
    gate, up = jnp.split(out.astype(x.dtype), 2, axis=1)
    return (jax.nn.silu(gate) * up).astype(out_dtype)
