"""How the TPU kernel computes a tile of many queries: logits stand upright, [tokens, queries].

A query's maximum and sum then lie in a lane: to find and to apply them takes no exchange between
lanes, and one register serves the whole tile. The sum is a row of the product with V, whose rows
follow after ones. The logits of a piece are made while the one before it is folded in, across tiles
too, and wait in memory and not in registers, of which there are too few.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from jpaged.pallas_kernels.mosaic_tpu import SUBLANES, tile_rows

# Finite, so that a query with nothing visible in a tile yields 0 and not inf - inf.
MASKED = -1e30
MAX_START = -1e20
# Pieces that an iteration computes, so that a long product hides the start and the end of the next.
# Tiles that need a mask are few: less of them is unrolled, for the sake of compilation.
GROUP = 4
MASKED_GROUP = 2
# Tokens of context of a product with V: the depth of the MXU of v6e and tpu7x. Of more of them V,
# transposed, and the first half's sums would fill the registers.
SLAB = 256
# Tokens that an iteration masks.
MASK_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upright:
    """The queries of an item in pieces, an even number of them."""

    num_pieces: int
    pieces_of_head: int
    rows: int
    tile_q: int
    tile_kv: int
    row_size: int
    dtype: Any  # of queries and of weights; the pool's may be narrower
    scale: float
    sliding_window: int | None
    soft_cap: float | None

    @property
    def factor(self) -> float:
        """From logits as they are kept to powers of two."""
        return math.log2(math.e) * (self.scale if self.soft_cap is None else 1.0)

    def scratch(self) -> tuple[Any, ...]:
        """The state of an item, and room for logits."""
        sums = tile_rows(self.dtype)
        return (
            # Maxima, each row the same, and room for what `_fold` waits for; the output, and above
            # it the sum of weights in each row.
            pltpu.VMEM((self.num_pieces + 1, SUBLANES, self.rows), jnp.float32),
            pltpu.VMEM((self.num_pieces, self.row_size + sums, self.rows), jnp.float32),
            # Logits of two pieces.
            pltpu.VMEM((2, self.tile_kv, self.rows), jnp.float32),
        )

    def clear(self, state) -> None:
        """Begins an item."""
        max_ref, acc_ref, _ = state

        @pl.loop(0, self.num_pieces)
        def _(piece):
            max_ref[piece] = jnp.full(max_ref.shape[1:], MAX_START, jnp.float32)
            acc_ref[piece] = jnp.zeros(acc_ref.shape[1:], jnp.float32)

    def result(self, piece, state) -> jax.Array:
        """The attention of a piece's queries, f32[rows, row_size]."""
        _, acc_ref, _ = state
        total = jnp.maximum(acc_ref[piece, :1], 1e-30)
        return (acc_ref[piece, tile_rows(self.dtype) :] / total).T

    def begin(self, packs, kv_tiles, state) -> None:
        """Makes the first logits of the first step, in slots 0."""
        keys = self._rows(kv_tiles, 0, 0, jnp.int32(0))
        self._make_logits(keys, self._queries(packs, 0, jnp.int32(0)), state[2].at[0])

    def attend(
        self,
        now: tuple[Any, Any],
        coming: tuple[Any, Any],
        packs,  # [slots, num_pieces // pieces_of_head, pieces_of_head * rows, row_size]
        kv_tiles,  # [slots, blocks, kinds, num_kv_heads, block_size, row_size]
        state,
        position: jax.Array,
        first_slot: jax.Array,
        start_some_blocks: Callable[[Any], None],
    ) -> None:
        """Folds a tile into the running softmax of an item, and makes the next one's first logits.

        Args:
            now: Slots of the item's queries and of the tile.
            coming: Those of the next step.
            packs: Queries of all slots.
            kv_tiles: Tiles of all slots.
            state: What `scratch` says.
            position: Context index of the first query.
            first_slot: Context index of the tile's first token.
            start_some_blocks: Has a share of the next blocks on their way, that of a piece.
        """
        max_ref, acc_ref, logits_ref = state

        offset = position - first_slot
        nearest = None if self.sliding_window is None else offset - self.sliding_window

        # 0, which the compiler cannot know.
        zero = lax.shift_right_logical(now[1], 4)

        def run(group, masked):
            @pl.loop(0, self.num_pieces // group)
            def _(i):
                for j in range(group):
                    piece = i * group + j
                    following = piece + 1
                    is_end = following == self.num_pieces
                    q_slot, kv_slot = now
                    if j + 1 == group:
                        following = jnp.where(is_end, 0, following)
                        q_slot = jnp.where(is_end, coming[0], q_slot)
                        kv_slot = jnp.where(is_end, coming[1], kv_slot)
                    start_some_blocks(piece)
                    visible = None
                    if masked:
                        # The next step masks its own. Were this the same in all iterations, masks
                        # would be made before the first, and wait in memory.
                        last = jnp.where(is_end, self.tile_kv, offset)
                        first = (
                            None if nearest is None else jnp.where(is_end, -self.tile_q, nearest)
                        )
                        visible = self._visible(j + 1, last, first, self.tile_kv)
                    self._make_logits(
                        self._rows(kv_tiles, kv_slot, 0, following),
                        self._queries(packs, q_slot, following),
                        logits_ref.at[(j + 1) & 1],
                        visible,
                    )
                    self._fold(
                        self._rows(kv_tiles, now[1], kv_tiles.shape[2] - 1, piece),
                        max_ref,
                        acc_ref,
                        logits_ref.at[j & 1],
                        piece,
                        0 if masked else zero,
                    )

        all_visible = first_slot + self.tile_kv - 1 <= position
        if self.sliding_window is not None:
            all_visible &= first_slot > position + self.tile_q - 1 - self.sliding_window
        group = GROUP if self.num_pieces % GROUP == 0 else 2

        @pl.when(all_visible)
        def _():
            run(group, masked=False)

        @pl.when(~all_visible)
        def _():
            self._mask_made(logits_ref.at[0], offset, nearest)
            run(MASKED_GROUP, masked=True)

    @property
    def _precision(self) -> lax.Precision | None:
        return lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

    def _queries(self, packs, slot, piece) -> jax.Array:
        """Queries of a piece, [rows, row_size]."""
        if self.pieces_of_head == 1:
            return packs[slot, piece]
        head = lax.div(piece, jnp.int32(self.pieces_of_head))
        first = pl.multiple_of(piece % self.pieces_of_head * self.rows, self.rows)
        return packs[slot, head, pl.ds(first, self.rows)]

    def _rows(self, kv_tiles, slot, kind, piece) -> jax.Array:
        """Keys or values of the head of a piece, [tile_kv, row_size]."""
        head = lax.div(piece, jnp.int32(self.pieces_of_head))
        rows = kv_tiles[slot, :, kind, head].reshape(self.tile_kv, self.row_size)
        return rows.astype(self.dtype)

    def _make_logits(self, keys, queries, logits_ref, visible=None) -> None:
        """Keys times queries where those are `visible`, scaled later unless they are capped."""
        x = lax.dot_general(
            keys,
            queries,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
            precision=self._precision,
        )
        if self.soft_cap is not None:
            x = self.soft_cap * jnp.tanh(x * (self.scale / self.soft_cap))
        logits_ref[...] = x if visible is None else jnp.where(visible, x, MASKED)

    def _mask_made(self, logits_ref, last, first) -> None:
        """Masks the first logits of a step, which the step before made."""
        step = math.gcd(self.tile_kv, MASK_ROWS)

        @pl.loop(0, self.tile_kv // step)
        def _(i):
            token = pl.multiple_of(i * step, step)
            rows = pl.ds(token, step)
            nearest = None if first is None else first - token
            visible = self._visible(0, last - token, nearest, step)
            logits_ref[rows] = jnp.where(visible, logits_ref[rows], MASKED)

    def _visible(self, piece, last, first, count) -> jax.Array:
        """Which of `count` tokens are past `first` and not past `last`, as query 0 sees them."""
        shape = (SUBLANES, self.rows)
        row = piece % self.pieces_of_head * self.rows + lax.broadcasted_iota(jnp.int32, shape, 1)
        behind = (row & (self.tile_q - 1)) - lax.broadcasted_iota(jnp.int32, shape, 0)
        # A register of tokens after another, compared with its number.
        tokens = range(0, count, SUBLANES)
        visible = jnp.concatenate([behind + last >= token for token in tokens], axis=0)
        if first is None:
            return visible
        return visible & jnp.concatenate([behind + first < token for token in tokens], axis=0)

    def _fold(self, values, max_ref, acc_ref, logits_ref, piece, zero) -> None:
        """Folds a piece in.

        The compiler forwards what is stored to a load of it, and loads early. What it may not know
        to be elsewhere, for a `zero` in its index, it leaves in memory until then.
        """
        # The logits are read twice: a maximum taken as they come would hold them in registers.
        top = jnp.max(_folded(logits_ref[...]), axis=0, keepdims=True)
        new_max = jnp.maximum(max_ref[piece], top)
        slab = min(self.tile_kv, SLAB)
        ones = jnp.ones((tile_rows(self.dtype), slab), self.dtype)
        for start in range(0, self.tile_kv, slab):
            rows = slice(start, start + slab)
            # In this order nothing but loads can run ahead of the maximum.
            weights = jnp.exp2((logits_ref[rows] - _tall(new_max, slab)) * self.factor)
            sums = lax.dot_general(
                jnp.concatenate([ones, values[rows].T], axis=0),
                weights.astype(self.dtype),
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
                precision=self._precision,
            )
            if start == 0:
                # The old maximum is read again only after the last weights.
                max_ref[self.num_pieces + zero] = weights[-SUBLANES:]
                rescale = jnp.exp2((max_ref[piece] - new_max) * self.factor)
                max_ref[piece] = new_max
                # Never above 1. So written it waits for the product, of which the sum of weights
                # comes first: else the rescaled output would wait, in registers.
                rescale = jnp.minimum(rescale, 1 + sums[:SUBLANES])
                acc_ref[piece] = acc_ref[piece] * _tall(rescale, sums.shape[0]) + sums
            else:
                acc_ref[piece + zero] += sums


def _tall(x: jax.Array, count: int) -> jax.Array:
    """Rows that are all the same, [SUBLANES, columns], with another number of them."""
    return jnp.concatenate([x] * (count // SUBLANES), axis=0)


def _folded(x: jax.Array) -> jax.Array:
    """The maximum over registers, [SUBLANES, columns], in two chains."""
    pieces = [x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES)]
    chains = [functools.reduce(jnp.maximum, pieces[i::2]) for i in range(min(2, len(pieces)))]
    return functools.reduce(jnp.maximum, chains)
