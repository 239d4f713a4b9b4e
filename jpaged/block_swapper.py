"""Blocks between the device's pools and host memory: what swapping and the host tier move.

A swapped block is one array on the host, all its layers together (`[num_layers, *block]`), in
page-locked memory where the backend offers it. Everything is dispatched
in the order of the steps and waited for by none of them: on the way out one program gathers the
blocks into arrays of their own, which travel while later steps write to the pool; on the way in
they travel while the step before runs, and one program writes them into the donated pools.
"""

import collections
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from jpaged.pallas_kernels import KVCacheSpec

logger = logging.getLogger(__name__)

Pools = tuple[jax.Array, ...]
Pairs = Sequence[tuple[int, int]]

# Blocks that a program moves: the smallest that holds what is left, padded by repeating the last
# block. More sizes would cost compilations; fewer, copies within the device.
_SIZES = (2, 16)
# Programs whose blocks may be on the device beside the pools at once.
_MAX_IN_FLIGHT = 4
# Kinds of memory on the host that a device's own copies reach, best first.
_MEMORY_KINDS = ("pinned_host", "unpinned_host")


class BlockSwapper:
    """Copies blocks of one device's pools to numbered places on the host, and back.

    On an accelerator the host memory is taken at once; on a CPU, where pool and host blocks lie in
    the same memory, as it is needed.

    Raises:
        ValueError: The backend does not give that much host memory.
    """

    def __init__(
        self,
        spec: KVCacheSpec,
        *,
        num_layers: int,
        num_blocks: int,
        num_host_blocks: int,
        on_copy_in: Callable[[int, float], None] | None = None,
        reserve: bool | None = None,
        sharding: jax.sharding.NamedSharding | None = None,
    ) -> None:
        """Takes the host memory.

        Args:
            spec: One layer's blocks, those of all devices together.
            num_layers: Pools, one a layer.
            num_blocks: Blocks of each pool, the null block included.
            num_host_blocks: Places on the host; their ids go from 1 to this.
            on_copy_in: Told the number of blocks and the seconds of each copy to the device, apart
                from waiting for steps; the host then waits for those copies.
            reserve: Whether to take the host memory at once; by default what the class says.
            sharding: Of the pools, over axis 2, where they lie on several devices.
        """
        self._spec = spec
        self._num_layers = num_layers
        self._num_blocks = num_blocks
        self._on_copy_in = on_copy_in
        device = jax.local_devices()[0]
        self._is_cpu = device.platform == "cpu"
        # A block has its layers where a pool has its blocks: both are cut alike.
        self._sharding = sharding
        self._device_memory = sharding or jax.sharding.SingleDeviceSharding(device)
        self._host_memory = _host_memory(device, self._device_memory)
        self._blocks: list[Any] = [None] * (num_host_blocks + 1)
        self._leaving: collections.deque[list[jax.Array]] = collections.deque()
        if not self._is_cpu if reserve is None else reserve:
            self._reserve()

    @staticmethod
    def device_bytes(spec: KVCacheSpec, num_layers: int) -> int:
        """Bytes of the device that copies may need beside the pools."""
        # A program's blocks one by one, and stacked.
        return 2 * _MAX_IN_FLIGHT * _SIZES[-1] * spec.block_bytes * num_layers

    def programs(self) -> dict[str, Callable[[], jax.stages.Compiled]]:
        """How to compile what the copies need, by name."""
        found: dict[str, Callable[[], jax.stages.Compiled]] = {}
        for size in _SIZES:
            found[f"swap_out_{size}"] = lambda size=size: self._compile_gather(size)
            found[f"swap_in_{size}"] = lambda size=size: self._compile_scatter(size)
        return found

    def swap_out(self, pools: Pools, pairs: Pairs, get_program: Callable[[str], Any]) -> None:
        """Starts copying blocks to the host.

        Args:
            pools: The layers' pools as the last step leaves them; they may be donated right after.
            pairs: (block of the pools, place on the host); a place named twice gets the last one.
            get_program: Gives a compiled one of `programs`.

        Raises:
            RuntimeError: An id is out of range, a bug of ours.
        """
        self._check(pairs)
        for size, piece in _pieces(pairs):
            while len(self._leaving) >= _MAX_IN_FLIGHT:
                jax.block_until_ready(self._leaving.popleft())
            ids = _padded([block_id for block_id, _ in piece], size)
            blocks = get_program(f"swap_out_{size}")(pools, ids)[: len(piece)]
            for _, place in piece:
                self._blocks[place] = None  # its memory is what the new content may take
            for (_, place), block in zip(piece, self._to_host(blocks), strict=True):
                self._blocks[place] = block

    def swap_in(self, pools: Pools, pairs: Pairs, get_program: Callable[[str], Any]) -> Pools:
        """Starts copying blocks to the device and returns the pools that have them.

        Args:
            pools: The layers' pools; donated.
            pairs: (place on the host, block of the pools). Places keep their content.
            get_program: Gives a compiled one of `programs`.

        Raises:
            RuntimeError: An id is out of range, or a place has never been written: bugs of ours.
        """
        self._check([(block_id, place) for place, block_id in pairs])
        for index, (size, piece) in enumerate(_pieces(pairs)):
            if index and index % _MAX_IN_FLIGHT == 0:
                jax.block_until_ready(pools[0])
            sources = [self._blocks[place] for place, _ in piece]
            if any(source is None for source in sources):
                raise RuntimeError(f"nothing was swapped out to a place of {piece}")
            blocks = self._to_device(sources)
            blocks += [blocks[-1]] * (size - len(blocks))
            ids = _padded([block_id for _, block_id in piece], size)
            pools = get_program(f"swap_in_{size}")(pools, tuple(blocks), ids)
        return pools

    def reset(self) -> None:
        """Forgets the blocks; their places may be written again."""
        self._leaving.clear()
        self._blocks = [None] * len(self._blocks)

    def _check(self, pairs: Pairs) -> None:
        for block_id, place in pairs:
            if not (0 < block_id < self._num_blocks and 0 < place < len(self._blocks)):
                raise RuntimeError(
                    f"block {block_id} must be in [1, {self._num_blocks - 1}] and host block "
                    f"{place} in [1, {len(self._blocks) - 1}]"
                )

    def _to_host(self, blocks: Sequence[jax.Array]) -> list[Any]:
        if self._host_memory is None:
            for block in blocks:
                block.copy_to_host_async()
            return [np.asarray(block) for block in blocks]
        copies = jax.device_put(list(blocks), self._host_memory)
        self._leaving.append(copies)
        return copies

    def _to_device(self, blocks: list[Any]) -> list[jax.Array]:
        if self._on_copy_in is None:
            return jax.device_put(blocks, self._device_memory)
        jax.block_until_ready(blocks)
        start = time.perf_counter()
        copies = jax.block_until_ready(jax.device_put(blocks, self._device_memory))
        self._on_copy_in(len(blocks), time.perf_counter() - start)
        return copies

    def _reserve(self) -> None:
        """Takes the memory of all places in one piece and leaves it to the allocator behind them.

        Which keeps it; an array for every place now would be a million for a small model.
        """
        num_places = len(self._blocks) - 1
        shape = (num_places * self._num_layers, *self._spec.shape(1)[1:])
        num_bytes = num_places * self._num_layers * self._spec.block_bytes
        try:
            if self._host_memory is not None:
                share = self._host_memory.shard_shape(shape)
                taken = jax.make_array_from_callback(
                    shape, self._host_memory, lambda _: np.zeros(share, self._spec.dtype)
                )
                jax.block_until_ready(taken).delete()
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            raise ValueError(
                f"swap_space must fit in the host memory that the device can use, and "
                f"{num_bytes / 2**30:.1f} GiB do not: {str(error).splitlines()[0]}"
            ) from error
        logger.info("host pool: %d blocks, %.0f MB", num_places, num_bytes / 1e6)

    # Programs.

    def _abstract(self, size: int) -> tuple[Any, Any, Any]:
        """Pools, `size` blocks, and their ids."""

        def cut(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, self._spec.dtype, sharding=self._sharding)

        pool = cut(*self._spec.shape(self._num_blocks))
        block = cut(self._num_layers, *self._spec.shape(1)[1:])
        on_all = self._sharding and jax.sharding.NamedSharding(
            self._sharding.mesh, jax.sharding.PartitionSpec()
        )
        ids = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=on_all)
        return (pool,) * self._num_layers, (block,) * size, ids

    def _compile_gather(self, size: int) -> jax.stages.Compiled:
        pools, _, ids = self._abstract(size)
        blocks = None if self._sharding is None else (self._sharding,) * size
        return jax.jit(_gather, out_shardings=blocks).lower(pools, ids).compile()

    def _compile_scatter(self, size: int) -> jax.stages.Compiled:
        # XLA takes long to compile many scatters for a CPU, and launches many kernels for a loop.
        scatter = _scatter_in_loop if self._is_cpu else _scatter
        after = None if self._sharding is None else (self._sharding,) * self._num_layers
        program = jax.jit(scatter, donate_argnums=0, out_shardings=after)
        return program.lower(*self._abstract(size)).compile()


def _gather(pools: Pools, ids: jax.Array) -> tuple[jax.Array, ...]:
    """The blocks of these ids, each with all its layers."""
    stacked = jnp.stack([pool[ids] for pool in pools], axis=1)
    return tuple(stacked[i] for i in range(ids.shape[0]))


def _scatter(pools: Pools, blocks: tuple[jax.Array, ...], ids: jax.Array) -> Pools:
    """The pools with these blocks at these ids; equal ids must come with equal blocks."""
    # Without the barrier XLA stacks the blocks once for each layer.
    stacked = lax.optimization_barrier(jnp.stack(blocks))
    return tuple(
        pool.at[ids].set(stacked[:, layer], mode="promise_in_bounds")
        for layer, pool in enumerate(pools)
    )


def _scatter_in_loop(pools: Pools, blocks: tuple[jax.Array, ...], ids: jax.Array) -> Pools:
    """What `_scatter` does, block by block."""
    stacked = lax.optimization_barrier(jnp.stack(blocks))

    def write(i: jax.Array, pools: Pools) -> Pools:
        block = lax.dynamic_index_in_dim(stacked, i, keepdims=False)
        return tuple(
            lax.dynamic_update_index_in_dim(pool, block[layer], ids[i], axis=0)
            for layer, pool in enumerate(pools)
        )

    return lax.fori_loop(0, ids.shape[0], write, pools)


def _host_memory(device: Any, sharding: jax.sharding.Sharding) -> jax.sharding.Sharding | None:
    """The best memory on the host that the devices' own copies reach; None for NumPy's."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    for kind in _MEMORY_KINDS:
        if kind in kinds:
            return sharding.with_memory_kind(kind)
    logger.warning("%s offers no host memory: swapping waits for its copies", device.platform)
    return None


def _pieces(pairs: Pairs) -> Iterator[tuple[int, Pairs]]:
    """Sizes of programs, and the pairs that go through each."""
    start = 0
    while start < len(pairs):
        left = len(pairs) - start
        size = next((size for size in _SIZES if size >= left), _SIZES[-1])
        yield size, pairs[start : start + size]
        start += size


def _padded(ids: list[int], size: int) -> NDArray[np.int32]:
    return np.array(ids + ids[-1:] * (size - len(ids)), np.int32)
