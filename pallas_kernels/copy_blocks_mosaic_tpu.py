"""The block copy on TPUs: all sources into VMEM, then all of them out again, by DMA."""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
from jaxtyping import Array, Int32

from jpaged.pallas_kernels.kv_cache_layout import KVCacheSpec, Pool
from jpaged.pallas_kernels.mosaic_tpu import pool_reasons

# What all sources of a call may take of VMEM.
COPY_BYTES = 16 * 2**20


def unsupported_reasons(pool: jax.Array, num_copies: int) -> list[str]:
    """Why the kernel cannot serve this problem on a TPU; empty if it can."""
    reasons = pool_reasons(KVCacheSpec.of(pool))
    if not num_copies or not pool.size:
        reasons.append("nothing to copy")
    else:
        num_bytes = num_copies * pool.size // pool.shape[0] * pool.dtype.itemsize
        if num_bytes > COPY_BYTES:
            reasons.append(f"takes up to {COPY_BYTES} bytes at once, got {num_bytes}")
    return reasons


def copy_blocks(
    pool: Pool,
    src: Int32[Array, " num_copies"],
    dst: Int32[Array, " num_copies"],
    *,
    interpret: Any = None,
) -> Pool:
    """See `copy_blocks.copy_blocks`; `interpret` takes `pltpu.InterpretParams`."""
    num_blocks, num_copies = pool.shape[0], src.shape[0]

    def body(src_ref, dst_ref, _, pool_ref, blocks, arrived, left):
        def for_each_pair(act):
            @pl.loop(0, num_copies)
            def _(i):
                source, destination = src_ref[i], dst_ref[i]
                in_pool = (source >= 0) & (source < num_blocks)
                in_pool &= (destination >= 0) & (destination < num_blocks)

                # A block onto itself, as padding has it, needs no copy.
                @pl.when(in_pool & (source != destination))
                def _():
                    act(i, source, destination)

        def copy_in(i, source):
            return pltpu.make_async_copy(pool_ref.at[source], blocks.at[i], arrived)

        def copy_out(i, destination):
            return pltpu.make_async_copy(blocks.at[i], pool_ref.at[destination], left)

        for_each_pair(lambda i, source, _: copy_in(i, source).start())
        for_each_pair(lambda i, source, _: copy_in(i, source).wait())
        for_each_pair(lambda i, _, destination: copy_out(i, destination).start())
        for_each_pair(lambda i, _, destination: copy_out(i, destination).wait())

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * 2 + [pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[
            pltpu.VMEM((num_copies, *pool.shape[1:]), pool.dtype),
            pltpu.SemaphoreType.DMA,
            pltpu.SemaphoreType.DMA,
        ],
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2 * COPY_BYTES),
        interpret=False if interpret is None else interpret,
        name="jpaged_copy_blocks",
    )(src, dst, pool)
