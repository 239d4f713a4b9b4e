"""The block copy on Mosaic GPU: a program owns one piece of every block, and moves it by TMA.

A pair's source may be another pair's destination. So a program reads its piece of all sources into
shared memory before it writes that piece of any destination, and no two programs share a piece.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

# Elements of a piece, in order of preference: TMA takes rows of up to 256 and wants them 128 bytes
# apart, and the pieces of all pairs have to fit in a program's shared memory.
PIECES = (256, 128, 64)
PIECE_BYTES = 128 * 1024


def unsupported_reasons(pool: jax.Array, num_copies: int) -> list[str]:
    """Why the kernel cannot serve this problem on a GPU that it runs on; empty if it can."""
    reasons = []
    if pool.dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"needs bfloat16 or float16, got {pool.dtype}")
    if not num_copies or not pool.size:
        reasons.append("nothing to copy")
    elif (pool.size // pool.shape[0]) % PIECES[0]:
        reasons.append(f"needs blocks of a multiple of {PIECES[0]} elements, got {pool.shape}")
    elif not _piece(num_copies):
        most = PIECE_BYTES // (2 * PIECES[-1])
        reasons.append(f"takes up to {most} copies at once, got {num_copies}")
    return reasons


def copy_blocks(
    pool: Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"],
    src: Int32[Array, " num_copies"],
    dst: Int32[Array, " num_copies"],
    *,
    interpret: bool = False,
) -> Float[Array, "num_blocks 2 num_kv_heads block_size head_dim"]:
    """See `copy_blocks.copy_blocks`; `interpret` runs it on the CPU."""
    num_blocks, num_copies = pool.shape[0], src.shape[0]
    piece = _piece(num_copies)
    num_pieces = pool.size // num_blocks // piece

    def body(src_ref, dst_ref, pool_ref, pieces, arrived):
        column = lax.axis_index("piece")

        @pl.loop(0, num_copies)
        def _(i):
            # A source outside the pool is not written anywhere, but the barrier counts its copy.
            block = jnp.clip(src_ref[i], 0, num_blocks - 1)
            plgpu.copy_gmem_to_smem(pool_ref.at[block, column], pieces.at[i], arrived)

        plgpu.barrier_wait(arrived)

        @pl.loop(0, num_copies)
        def _(i):
            src_block, dst_block = src_ref[i], dst_ref[i]

            @pl.when(
                (src_block >= 0)
                & (src_block < num_blocks)
                & (dst_block >= 0)
                & (dst_block < num_blocks)
            )
            def _():
                plgpu.copy_smem_to_gmem(pieces.at[i], pool_ref.at[dst_block, column])

        plgpu.wait_smem_to_gmem(0)

    pool_ref = jax.new_ref(pool.reshape(num_blocks, num_pieces, piece))
    plgpu.kernel(
        body,
        out_type=(),
        grid=(num_pieces,),
        grid_names=("piece",),
        scratch_types=(
            plgpu.SMEM((num_copies, piece), pool.dtype),
            plgpu.Barrier(num_arrivals=num_copies),
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="copy_blocks",
    )(src, dst, pool_ref)
    return jax.freeze(pool_ref).reshape(pool.shape)


def _piece(num_copies: int) -> int:
    return next((n for n in PIECES if 2 * n * num_copies <= PIECE_BYTES), 0)
