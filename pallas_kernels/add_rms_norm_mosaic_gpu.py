"""Residual addition and RMS norm on Mosaic GPU: one program a row, which stays in registers.

A row is read once: every load is issued before the one reduction that crosses warps, so that a
small batch takes the latency of a launch, a load and a reduction.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jpaged.pallas_kernels.mosaic_gpu import store

# Elements of a row that a program of 128 threads can hold in registers.
MAX_SIZE = 16384
THREADS = 128
LANES = 32


def unsupported_reasons(residual: jax.Array) -> list[str]:
    """Why the kernel cannot serve this problem on a GPU that it runs on; empty if it can."""
    num_rows, size = residual.shape
    reasons = []
    if residual.dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"needs bfloat16 or float16, got {residual.dtype}")
    if size % LANES or not 0 < size <= MAX_SIZE:
        reasons.append(f"needs rows of a multiple of {LANES} up to {MAX_SIZE}, got {size}")
    if not num_rows:
        reasons.append("no rows")
    return reasons


def add_rms_norm(
    residual: Float[Array, "num_rows size"],
    delta: Float[Array, "*num_parts num_rows size"] | None,
    weight: Float[Array, " size"],
    eps: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "num_rows size"], Float[Array, "num_rows size"]]:
    """See `add_rms_norm.add_rms_norm`; `interpret` runs it on the CPU."""
    num_rows, size = residual.shape
    dtype = residual.dtype
    load = functools.partial(plgpu.load, layout=_row_layout(size), optimized=False)

    def body(residual_ref, weight_ref, *refs):
        row = lax.axis_index("row")
        x = load(residual_ref.at[row])
        weight = load(weight_ref)
        if delta is None:
            (normed_ref,) = refs
        else:
            delta_ref, normed_ref, sum_ref = refs
            if delta.ndim == 3:
                parts = [load(delta_ref.at[part, row]) for part in range(delta.shape[0])]
                added = functools.reduce(jnp.add, parts).astype(dtype)
            else:
                added = load(delta_ref.at[row])
            x = (x.astype(jnp.float32) + added.astype(jnp.float32)).astype(dtype)
            store(sum_ref.at[row], x)
        x = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.sum(x * x) * (1 / size) + eps)
        normed = (x * scale).astype(dtype)
        # The product of two 16-bit floats is exact in f32: this rounds once, as they would.
        product = normed.astype(jnp.float32) * weight.astype(jnp.float32)
        store(normed_ref.at[row], product.astype(dtype))

    out = jax.ShapeDtypeStruct(residual.shape, dtype)
    outs = plgpu.kernel(
        body,
        out_type=(out,) if delta is None else (out, out),
        grid=(num_rows,),
        grid_names=("row",),
        # No memory is both read and written here.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="add_rms_norm",
    )(residual, weight, *(() if delta is None else (delta,)))
    return (residual, *outs) if delta is None else (outs[1], outs[0])


def _row_layout(size: int):
    """A row over 128 threads in loads of up to 16 bytes of 16-bit elements.

    Where 128 threads cannot share it evenly, each of the four warps holds all of it.
    """
    threads = THREADS if size % THREADS == 0 else LANES
    vec = next(v for v in (8, 4, 2, 1) if size % (threads * v) == 0)
    if threads == LANES:
        return plgpu.Layout.TILED(
            plgpu.Tiling(((LANES * vec,), (vec,))),
            warp_dims=(plgpu.Replicated(THREADS // LANES),),
            lane_dims=(-2,),
            vector_dim=-1,
        )
    return plgpu.Layout.TILED(
        plgpu.Tiling(((THREADS * vec,), (LANES * vec,), (vec,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    )
