"""How the TPU kernel reads the queries of an item, and writes what becomes of them.

An item's tokens are consecutive rows of q, which a DMA for each power of two brings, wherever they
begin. A product needs the queries of a KV head together, though, and not those of a token: those of
a chunk are rearranged once an item, through a copy in 32 bits of which a load takes every n-th row.
A decode's lie right already.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from jpaged.pallas_kernels.mosaic_tpu import LANES

# Items whose queries are held: a power of two, above the steps that they are fetched ahead.
SLOTS = 4
# Tokens converted at a time.
GROUP = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queries:
    """The queries of an item, in packs: rows of a pack are (head, query)."""

    tile_q: int
    num_tokens: int
    num_heads: int
    num_packs: int
    packed_heads: int
    rows: int
    row_size: int
    dtype: Any

    @property
    def heads_of_pack(self) -> int:
        """Query heads of a pack."""
        return self.num_heads // self.num_packs

    @property
    def stride(self) -> int:
        """Rows from a token to the next in 32 bits: odd, so that one load takes eight of them.

        Of an even stride each row takes a load of its own: eleven times the cycles, for 32 heads.
        """
        return self.num_heads | 1

    def scratch(self) -> tuple[Any, ...]:
        """Tokens as they come, as they go, and in 32 bits; packs of a chunk; semaphores."""
        tile = (self.tile_q, self.num_heads, self.row_size)
        packs = (2, self.num_packs, self.rows, self.row_size)
        return (
            pltpu.VMEM((SLOTS, *tile), self.dtype),
            pltpu.VMEM((2, *tile), self.dtype),
            # Loads of every n-th row need rows of one register.
            pltpu.VMEM((self.row_size // LANES, self.tile_q * self.stride, LANES), jnp.float32),
            *((pltpu.VMEM(packs, self.dtype),) if self.tile_q > 1 else ()),
            pltpu.SemaphoreType.DMA((SLOTS,)),
            pltpu.SemaphoreType.DMA((2,)),
        )

    def bind(self, q_ref, out_ref, scratch) -> "BoundQueries":
        """The same with the refs of a kernel: all queries, all outputs and what `scratch` says."""
        tokens, outputs, wide, *packs, arrived, left = scratch
        return BoundQueries(
            self, q_ref, out_ref, tokens, outputs, wide, packs[0] if packs else None, arrived, left
        )


@dataclasses.dataclass(frozen=True)
class BoundQueries:
    """See `Queries.bind`."""

    queries: Queries
    q_ref: Any  # [num_tokens, num_heads, row_size]
    out_ref: Any  # the same
    tokens: Any  # [SLOTS, tile_q, num_heads, row_size]
    outputs: Any  # [2, tile_q, num_heads, row_size]
    wide: Any  # f32[row_size // LANES, tile_q * stride, LANES]
    packs: Any  # [2, num_packs, rows, row_size]
    arrived: Any
    left: Any

    def start_read(self, item, first_token, count) -> None:
        """Has the `count` tokens of an item on their way."""
        self._each_part(
            count, lambda size, start: self._read(item, first_token, size, start).start()
        )

    def wait_read(self, item, count) -> None:
        """Waits for them, and packs them if they are a chunk."""
        self._each_part(count, lambda size, start: self._read(item, 0, size, 0).wait())
        if self.queries.tile_q > 1:
            self._pack(item)

    def start_write(self, item, first_token, count) -> None:
        """Has the outputs of an item, which `put` was given, on their way."""

        def narrow(token, rows):
            for i, lanes in enumerate(self._parts_of_rows):
                values = self.wide[i, rows].astype(self.outputs.dtype)
                self.outputs[item & 1, token, :, lanes] = values

        self._each_token(narrow)

        self._each_part(
            count, lambda size, start: self._write(item, first_token, size, start).start()
        )

    def wait_write(self, item, count) -> None:
        """Waits until they are written."""
        self._each_part(count, lambda size, start: self._write(item, 0, size, 0).wait())

    def _each_part(self, count, act: Callable[[int, Any], None]) -> None:
        """Calls `act` with powers of two that sum to `count`, and what comes before each."""
        largest = min(self.queries.tile_q, self.queries.num_tokens)
        if largest == 1:
            act(1, 0)
            return
        for bit in reversed(range(largest.bit_length())):
            size = 1 << bit

            @pl.when((count & size) != 0)
            def _(size=size):
                act(size, count & -(2 * size))

    def _read(self, item, first_token, size, start):
        slot = item & (SLOTS - 1)
        return pltpu.make_async_copy(
            self.q_ref.at[pl.ds(first_token + start, size)],
            self.tokens.at[slot, pl.ds(start, size)],
            self.arrived.at[slot],
        )

    def _write(self, item, first_token, size, start):
        slot = item & 1
        return pltpu.make_async_copy(
            self.outputs.at[slot, pl.ds(start, size)],
            self.out_ref.at[pl.ds(first_token + start, size)],
            self.left.at[slot],
        )

    # Between tokens and packs.

    @property
    def _parts_of_rows(self) -> list[Any]:
        """Where the parts that `wide` has are in a row."""
        return [pl.ds(i * LANES, LANES) for i in range(self.queries.row_size // LANES)]

    def _each_token(self, act: Callable[[Any, Any], None]) -> None:
        """Calls `act` with each token and its rows in `wide`."""
        x = self.queries
        group = min(GROUP, x.tile_q)

        @pl.loop(0, x.tile_q // group)
        def _(i):
            for j in range(group):
                token = i * group + j
                act(token, pl.ds(token * x.stride, x.num_heads))

    def _rows_of_head(self, head, first=0, count=None) -> Any:
        """Where the queries of a head are in `wide`, or some of them."""
        x = self.queries
        count = x.tile_q if count is None else count
        return pl.ds(first * x.stride + head, count, stride=x.stride)

    def _pack(self, item) -> None:
        x = self.queries

        def widen(token, rows):
            for i, lanes in enumerate(self._parts_of_rows):
                values = self.tokens[item & (SLOTS - 1), token, :, lanes]
                self.wide[i, rows] = values.astype(jnp.float32)

        self._each_token(widen)

        @pl.loop(0, x.num_packs)
        def _(pack):
            for i in range(x.heads_of_pack):
                rows = pl.ds(i * x.tile_q, x.tile_q)
                for j, lanes in enumerate(self._parts_of_rows):
                    values = self.wide[j, self._rows_of_head(pack * x.heads_of_pack + i)]
                    self.packs[item & 1, pack, rows, lanes] = values.astype(self.packs.dtype)

    def pack(self, item, pack: int) -> jax.Array:
        """Queries of a pack, [rows, packed_heads * row_size].

        Heads lie in a block diagonal, so that one product with their keys side by side gives the
        logits of each with its own keys only.
        """
        x = self.queries
        if x.tile_q > 1:
            return self.packs[item & 1, pack]
        heads = self.tokens[item & (SLOTS - 1), 0].astype(jnp.float32)
        own = heads[pack * x.heads_of_pack : (pack + 1) * x.heads_of_pack]
        if x.rows > x.heads_of_pack:
            rest = jnp.zeros((x.rows - x.heads_of_pack, x.row_size), jnp.float32)
            own = jnp.concatenate([own, rest], axis=0)
        parts = [jnp.where(mine, own, 0.0) for mine in self._rows_of_packed_heads()]
        return jnp.concatenate(parts, axis=1).astype(x.dtype)

    def _rows_of_packed_heads(self) -> list[jax.Array]:
        """Of a decode: which rows are of a KV head, for each that a pack has."""
        x = self.queries
        row = lax.broadcasted_iota(jnp.int32, (x.rows, x.row_size), 0)
        group_size = x.heads_of_pack // x.packed_heads
        firsts = [i * group_size for i in range(x.packed_heads)]
        return [(row >= first) & (row < first + group_size) for first in firsts]

    def put(self, pack, first_row: int, values: jax.Array) -> None:
        """Keeps outputs of a pack, f32[n, packed_heads * row_size], from row `first_row` on."""
        x = self.queries
        first_head = pack * x.heads_of_pack
        if x.tile_q == 1:
            parts = [
                jnp.where(mine, values[:, i * x.row_size : (i + 1) * x.row_size], 0.0)
                for i, mine in enumerate(self._rows_of_packed_heads())
            ]
            self._put(pl.ds(first_head, x.heads_of_pack), sum(parts)[: x.heads_of_pack])
            return
        row, end = first_row, first_row + values.shape[0]
        while row < end:
            head, first = divmod(row, x.tile_q)
            count = min(x.tile_q - first, end - row)
            part = values[row - first_row : row - first_row + count]
            self._put(self._rows_of_head(first_head + head, first, count), part)
            row += count

    def _put(self, rows, values: jax.Array) -> None:
        for i in range(self.queries.row_size // LANES):
            self.wide[i, rows] = values[:, i * LANES : (i + 1) * LANES]
