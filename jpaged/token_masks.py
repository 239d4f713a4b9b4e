"""Masks of allowed tokens on their way to the device, into rows of `SamplerState.allowed`.

A few small programs, one for each number of rows, write them; the step's programs read them where
they lie, so that there are no more of those, and a mask travels once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jpaged.structured_outputs import mask_width

# A step in flight may still be reading what was sent before it: `InputBatch` has three buffers for
# one step each, and of masks there may be two lots a step, of admitted sequences and of others.
NUM_BUFFERS = 6

MIN_ROWS = 8


class TokenMasks:
    """Sends masks.

    Args:
        num_rows: Sequences that may run at once.
        vocab_size: Number of token ids.
        on_all: Says of shapes that their arrays are whole on every device.
    """

    def __init__(self, num_rows: int, vocab_size: int, on_all: Callable[[Any], Any]) -> None:
        self._num_rows = num_rows
        self._on_all = on_all
        self._width = mask_width(vocab_size)
        self._sizes = _powers_of_8(min(MIN_ROWS, num_rows), num_rows)
        self._buffers: list[NDArray[np.int32]] = []
        self._turn = 0

    def programs(self) -> dict[str, Callable[[], Any]]:
        """What is to be compiled, by name."""
        return {_name(size): lambda size=size: self._compile(size) for size in self._sizes}

    def fill(
        self, rows: Sequence[int], fill: Callable[[NDArray[np.int32]], None]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns rows and masks as `send` takes them, valid for `NUM_BUFFERS` calls.

        Args:
            rows: where the masks go.
            fill: writes them into an `int32[N, W]` in the same order.
        """
        if not self._buffers:
            shape = (self._num_rows, self._width)
            self._buffers = [np.zeros(shape, np.int32) for _ in range(NUM_BUFFERS)]
        self._turn = (self._turn + 1) % NUM_BUFFERS
        size = next(size for size in self._sizes if size >= len(rows))
        masks = self._buffers[self._turn][:size]
        fill(masks[: len(rows)])
        padded = np.full(size, self._num_rows, np.int32)  # past the end: dropped
        padded[: len(rows)] = rows
        return padded, masks

    def send(
        self,
        allowed: jax.Array,
        rows: NDArray[np.int32],
        masks: NDArray[np.int32],
        get_program: Callable[[str], Any],
    ) -> jax.Array:
        """Returns `allowed` with new masks in some rows.

        Args:
            allowed: `int32[R, W]`; donated.
            rows: where the masks go.
            masks: as many.
            get_program: gives the compiled program of a name.
        """
        return get_program(_name(len(rows)))(allowed, rows, masks)

    def _compile(self, size: int) -> jax.stages.Compiled:
        def ints(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        def set_masks(allowed: jax.Array, rows: jax.Array, masks: jax.Array) -> jax.Array:
            return allowed.at[rows].set(masks, mode="drop")

        args = (ints(self._num_rows, self._width), ints(size), ints(size, self._width))
        return jax.jit(set_masks, donate_argnums=0).lower(*self._on_all(args)).compile()


def _name(size: int) -> str:
    return f"set_masks_{size}"


def _powers_of_8(start: int, stop: int) -> list[int]:
    sizes = []
    while start < stop:
        sizes.append(start)
        start *= 8
    return [*sizes, stop]
