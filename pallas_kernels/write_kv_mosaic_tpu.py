"""The write into the pool on TPUs, in place.

16-bit rows share registers two by two and tiles of HBM are written whole, so the unit is a window:
the rows of all heads in one tile of a block. Windows are read, the step's rows put in, and written
back, a batch of them at a time. Tokens are sorted by slot first: a window comes up once.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jpaged.pallas_kernels.kv_cache_layout import KVCacheSpec, Pool, rows_of
from jpaged.pallas_kernels.mosaic_tpu import LANES, pool_reasons, tile_rows

# Windows on their way together: each batch waits for one read and one write.
BATCH = 8
# Tokens of a call: what is known of each lies in scalar memory.
MAX_TOKENS = 16384
VMEM_BYTES = 16 * 2**20


def unsupported_reasons(pool: jax.Array, num_tokens: int) -> list[str]:
    """Why the kernel cannot serve this problem on a TPU; empty if it can."""
    reasons = pool_reasons(KVCacheSpec.of(pool))
    if not 1 <= num_tokens <= MAX_TOKENS:
        reasons.append(f"takes 1 to {MAX_TOKENS} tokens, got {num_tokens}")
    return reasons


def write_kv(
    pool: Pool,
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    slot_mapping: Int32[Array, " num_tokens"],
    *,
    interpret: Any = None,
) -> Pool:
    """See `write_kv.write_kv`; `interpret` takes `pltpu.InterpretParams`."""
    kv = rows_of(k, v, KVCacheSpec.of(pool).layout)
    return write_rows(pool, kv.reshape(k.shape[0], -1, pool.shape[-1]), slot_mapping, interpret)


def write_rows(
    pool: Pool,
    kv: Float[Array, "num_tokens num_rows row_size"],
    slot_mapping: Int32[Array, " num_tokens"],
    interpret: Any = None,
) -> Pool:
    """Writes the rows of each token, `num_rows` of all kinds and heads, as `write_kv` does.

    Of two tokens with one slot the later one stays.
    """
    num_blocks, kinds, num_kv_heads, block_size, row_size = pool.shape
    rows = tile_rows(pool.dtype)
    num_tokens = kv.shape[0]
    num_slots = num_blocks * block_size
    out = num_slots  # where a slot outside the pool goes: behind all others
    slots = jnp.where((slot_mapping >= 0) & (slot_mapping < num_slots), slot_mapping, out)
    token = jnp.argsort(slots, stable=True).astype(jnp.int32)
    slots = slots[token]
    windows = slots // rows
    is_first = (windows != jnp.roll(windows, 1).at[0].set(-1)) & (slots < out)
    starts = jnp.nonzero(is_first, size=num_tokens + 1, fill_value=jnp.sum(slots < out))[0]
    # Which windows are written whole, in the order of the tokens: a prompt's, most of them.
    is_next = (jnp.diff(token) == 1) & (jnp.diff(slots) == 1)
    count = jnp.cumsum(is_next, dtype=jnp.int32)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), count])
    last = jnp.minimum(starts + rows - 1, num_tokens - 1)
    is_whole = (before[last] - before[jnp.minimum(starts, num_tokens - 1)]) == rows - 1
    is_whole &= jnp.concatenate([jnp.diff(starts), jnp.zeros(1, starts.dtype)]) == rows
    # As tokens lie in XLA. Elements of 8 bits are exact in 16 and need no tiles of their own.
    dtype = jnp.float32 if pool.dtype == jnp.float32 else jnp.bfloat16
    kv = kv.astype(dtype)

    def body(*refs):
        _write(*refs, rows=rows, windows_per_block=block_size // rows)

    window_shape = (kinds, num_kv_heads, rows, row_size)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * 5
        + [pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[
            pltpu.VMEM((BATCH, *window_shape), pool.dtype),
            pltpu.VMEM((BATCH, rows, *kv.shape[1:]), dtype),
            # Of odd strides and rows of one register a load takes every n-th row at once.
            pltpu.VMEM((row_size // LANES, rows * (kv.shape[1] | 1), LANES), jnp.float32),
            pltpu.SemaphoreType.DMA,
            pltpu.SemaphoreType.DMA,
            pltpu.SemaphoreType.DMA,
        ],
        input_output_aliases={6: 0},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2 * VMEM_BYTES),
        interpret=False if interpret is None else interpret,
        name="jpaged_write_kv",
    )(
        token,
        slots.astype(jnp.int32),
        starts.astype(jnp.int32),
        is_whole.astype(jnp.int32),
        jnp.sum(is_first, dtype=jnp.int32)[None],
        kv,
        pool,
    )


def _write(
    # Inputs
    token_ref,  # i32[num_tokens]: tokens in the order of their slots
    slot_ref,  # i32[num_tokens]: and their slots
    start_ref,  # i32[num_tokens + 1]: where each window begins in that order
    is_whole_ref,  # i32[num_tokens + 1]: whether its rows are those of consecutive tokens
    num_windows_ref,  # i32[1]
    kv_ref,  # [num_tokens, kinds * num_kv_heads, row_size]
    _,  # the pool, which the output is
    # Outputs
    pool_ref,  # [num_blocks, kinds, num_kv_heads, block_size, row_size]
    # Scratch
    windows,  # [BATCH, kinds, num_kv_heads, rows, row_size]
    new_rows,  # [BATCH, rows, kinds * num_kv_heads, row_size]
    wide,  # f32[row_size // LANES, rows * stride, LANES]
    window_arrived,
    row_arrived,
    window_left,
    *,
    rows,
    windows_per_block,
):
    num_windows = num_windows_ref[0]

    def place(i):
        """The window's part of the pool."""
        window = lax.div(slot_ref[start_ref[i]], jnp.int32(rows))
        block = lax.div(window, jnp.int32(windows_per_block))
        first = pl.multiple_of(lax.rem(window, jnp.int32(windows_per_block)) * rows, rows)
        return pool_ref.at[block, :, :, pl.ds(first, rows)]

    def copy_in(i, n):
        return pltpu.make_async_copy(place(i), windows.at[n], window_arrived)

    def copy_out(i, n):
        return pltpu.make_async_copy(windows.at[n], place(i), window_left)

    def copy_row(position, n):
        offset = lax.rem(slot_ref[position], jnp.int32(rows))
        return pltpu.make_async_copy(
            kv_ref.at[token_ref[position]], new_rows.at[n, offset], row_arrived
        )

    num_heads = new_rows.shape[2]
    stride = num_heads | 1
    parts = [(i, pl.ds(i * LANES, LANES)) for i in range(wide.shape[0])]

    def put_window(n):
        for row in range(rows):
            for part, lanes in parts:
                values = new_rows[n, row, :, lanes].astype(jnp.float32)
                wide[part, pl.ds(row * stride, num_heads)] = values
        for i in range(num_heads):
            kind, head = divmod(i, windows.shape[2])
            for part, lanes in parts:
                values = wide[part, pl.ds(i, rows, stride=stride)]
                windows[n, kind, head, :, lanes] = values.astype(windows.dtype)

    def put_row(n, position):
        offset = lax.rem(slot_ref[position], jnp.int32(rows))
        is_new = lax.broadcasted_iota(jnp.int32, (rows, LANES), 0) == offset
        for part, lanes in parts:
            # A load spreads one row of 32 bits over a register.
            wide[part, :num_heads] = new_rows[n, offset, :, lanes].astype(jnp.float32)
            for i in range(num_heads):
                kind, head = divmod(i, windows.shape[2])
                old = windows[n, kind, head, :, lanes].astype(jnp.float32)
                new = jnp.broadcast_to(wide[part, pl.ds(i, 1)], old.shape)
                values = jnp.where(is_new, new, old)
                windows[n, kind, head, :, lanes] = values.astype(windows.dtype)

    def for_each_copy(i, n, act):
        """Calls `act` with the copies that bring a window's rows, the old ones where any stay."""
        has_whole = kv_ref.shape[0] >= rows
        is_whole = (is_whole_ref[i] != 0) if has_whole else jnp.bool_(False)
        if has_whole:

            @pl.when(is_whole)
            def _():
                first = token_ref[start_ref[i]]
                act(
                    pltpu.make_async_copy(
                        kv_ref.at[pl.ds(first, rows)], new_rows.at[n], row_arrived
                    )
                )

        @pl.when(~is_whole)
        def _():
            act(copy_in(i, n))

            def copy(position):
                @pl.when(is_last_of_its_slot(position, start_ref[i + 1]))
                def _():
                    act(copy_row(position, n))

            for_each_row(i, copy)

    def for_each_row(i, act):
        pl.loop(start_ref[i], start_ref[i + 1])(act)

    def is_last_of_its_slot(position, end):
        following = slot_ref[jnp.minimum(position + 1, slot_ref.shape[0] - 1)]
        return (position + 1 == end) | (following != slot_ref[position])

    @pl.loop(0, pl.cdiv(num_windows, BATCH))
    def _(batch):
        first = batch * BATCH
        count = jnp.minimum(num_windows - first, BATCH)

        @pl.loop(0, count)
        def _(n):
            for_each_copy(first + n, n, lambda copy: copy.start())

        @pl.loop(0, count)
        def _(n):
            for_each_copy(first + n, n, lambda copy: copy.wait())

        @pl.loop(0, count)
        def _(n):
            is_whole = is_whole_ref[first + n] != 0

            @pl.when(is_whole)
            def _():
                put_window(n)

            @pl.when(~is_whole)
            def _():
                for_each_row(first + n, functools.partial(put_row, n))

            copy_out(first + n, n).start()

        @pl.loop(0, count)
        def _(n):
            copy_out(first + n, n).wait()
