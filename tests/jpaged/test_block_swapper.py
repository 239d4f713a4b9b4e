"""Blocks out to the host and back: contents, order, and what the compiled programs do not copy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import block_swapper
from jpaged.block_swapper import BlockSwapper
from jpaged.pallas_kernels import KVCacheSpec

NUM_LAYERS, NUM_BLOCKS, NUM_PLACES = 3, 50, 40


class Swapper:
    """A swapper with its pools, beside plain arrays of what they should hold."""

    def __init__(self, dtype="float32", **options) -> None:
        self.spec = KVCacheSpec(block_size=8, num_kv_heads=2, head_dim=4, dtype=jnp.dtype(dtype))
        self.swapper = BlockSwapper(
            self.spec,
            num_layers=NUM_LAYERS,
            num_blocks=NUM_BLOCKS,
            num_host_blocks=NUM_PLACES,
            **options,
        )
        rng = np.random.RandomState(0)
        shape = self.spec.shape(NUM_BLOCKS)
        self.expected = [rng.standard_normal(shape).astype(dtype) for _ in range(NUM_LAYERS)]
        self.pools = tuple(jnp.array(pool) for pool in self.expected)
        self.places = {}
        self.compiled = {}

    def get(self, name):
        if name not in self.compiled:
            self.compiled[name] = self.swapper.programs()[name]()
        return self.compiled[name]

    def swap_out(self, pairs):
        self.swapper.swap_out(self.pools, pairs, self.get)
        for block_id, place in pairs:
            self.places[place] = [pool[block_id].copy() for pool in self.expected]

    def swap_in(self, pairs):
        self.pools = self.swapper.swap_in(self.pools, pairs, self.get)
        for place, block_id in pairs:
            for pool, block in zip(self.expected, self.places[place], strict=True):
                pool[block_id] = block

    def overwrite(self, block_id, value):
        """What a step does: the pools are donated, and the block is written."""
        self.pools = jax.jit(
            lambda pools: tuple(pool.at[block_id].set(value) for pool in pools), donate_argnums=0
        )(self.pools)
        for pool in self.expected:
            pool[block_id] = value

    def check(self):
        for pool, expected in zip(self.pools, self.expected, strict=True):
            np.testing.assert_array_equal(np.asarray(pool), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 16, 35])
def test_blocks_come_back_whole_and_elsewhere(num_blocks, dtype):
    swapper = Swapper(dtype)
    swapper.swap_out([(1 + i, NUM_PLACES - i) for i in range(num_blocks)])
    for block_id in range(1, 1 + num_blocks):
        swapper.overwrite(block_id, -7.0)
    swapper.swap_in([(NUM_PLACES - i, NUM_BLOCKS - 1 - i) for i in range(num_blocks)])
    swapper.check()


def test_random_moves_equal_those_of_plain_arrays():
    swapper, rng = Swapper(), np.random.RandomState(1)
    for _ in range(60):
        count = rng.randint(1, 20)
        blocks = (1 + rng.permutation(NUM_BLOCKS - 1)[:count]).tolist()
        places = (1 + rng.permutation(NUM_PLACES)[:count]).tolist()
        if rng.rand() < 0.5:
            swapper.swap_out(list(zip(blocks, places, strict=True)))
        else:
            known = [place for place in places if place in swapper.places]
            swapper.swap_in(list(zip(known, blocks, strict=False)))
        if rng.rand() < 0.3:
            swapper.overwrite(blocks[0], rng.rand())
    swapper.check()


def test_a_place_can_be_written_and_read_in_the_same_step():
    swapper = Swapper()
    swapper.swap_out([(3, 1)])
    swapper.swap_in([(1, 4)])
    swapper.swap_out([(5, 1)])
    swapper.swap_in([(1, 3)])
    swapper.check()


def test_pools_are_updated_in_place():
    swapper = Swapper()
    swapper.swap_out([(1, 1), (2, 2)])
    before = [pool.unsafe_buffer_pointer() for pool in swapper.pools]
    swapper.swap_in([(1, 7), (2, 8)])
    assert [pool.unsafe_buffer_pointer() for pool in swapper.pools] == before
    pool = ",".join(map(str, swapper.spec.shape(NUM_BLOCKS)))
    for size in block_swapper._SIZES:
        text = swapper.get(f"swap_in_{size}").as_text()
        assert not re.search(rf"f32\[{pool}\]\S* copy", text)
        text = swapper.get(f"swap_out_{size}").as_text()
        assert not re.search(rf"f32\[{pool}\]\S* (copy|parameter.*fusion)", text)


def test_both_ways_of_writing_are_the_same():
    swapper = Swapper()
    blocks = tuple(jnp.full((NUM_LAYERS, *swapper.spec.shape(1)[1:]), i) for i in (1.0, 2.0, 2.0))
    ids = jnp.array([4, 9, 9], jnp.int32)
    one = block_swapper._scatter(swapper.pools, blocks, ids)
    other = block_swapper._scatter_in_loop(swapper.pools, blocks, ids)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_host_blocks_are_page_locked_where_the_backend_offers_it():
    swapper = Swapper()
    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    swapper.swap_out([(1, 5)])
    block = swapper.swapper._blocks[5]
    best = next((kind for kind in block_swapper._MEMORY_KINDS if kind in kinds), None)
    assert best is not None, "every backend we know offers one"
    assert block.sharding.memory_kind == best


def test_a_backend_without_host_memory_uses_numpy(monkeypatch):
    class Bare:
        platform = "bare"

        def addressable_memories(self):
            return []

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    assert block_swapper._host_memory(Bare(), here) is None
    monkeypatch.setattr(block_swapper, "_host_memory", lambda device, sharding: None)
    swapper = Swapper(reserve=True)
    swapper.swap_out([(i, i) for i in range(1, 20)])
    assert isinstance(swapper.swapper._blocks[1], np.ndarray)
    swapper.swap_in([(i, 40 - i) for i in range(1, 20)])
    swapper.check()


def test_memory_may_be_taken_at_once(monkeypatch):
    taken = []
    make = jax.make_array_from_callback

    def note(*args):
        taken.append(make(*args))
        return taken[-1]

    monkeypatch.setattr(jax, "make_array_from_callback", note)
    swapper = Swapper(reserve=True)
    (array,) = taken
    assert array.is_deleted()
    assert array.nbytes == NUM_PLACES * swapper.swapper._spec.block_bytes * NUM_LAYERS
    swapper.swap_out([(1, 5)])
    swapper.swap_in([(5, 2)])
    swapper.check()


def test_too_much_host_memory_is_refused(monkeypatch):
    def make(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no more\nmore lines")

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    with pytest.raises(
        ValueError, match=r"^swap_space must fit .* 0\.0 GiB do not: RESOURCE.*more$"
    ):
        Swapper(reserve=True)


def test_copies_in_are_timed_when_asked_for():
    timed = []
    swapper = Swapper(on_copy_in=lambda *args: timed.append(args))
    swapper.swap_out([(i, i) for i in range(1, 20)])
    swapper.swap_in([(i, i) for i in range(1, 20)])
    assert [num_blocks for num_blocks, _ in timed] == [16, 3]
    assert all(seconds > 0 for _, seconds in timed)
    swapper.check()


@pytest.mark.parametrize("pair", [(0, 1), (NUM_BLOCKS, 1), (1, 0), (1, NUM_PLACES + 1)])
def test_ids_out_of_range_are_errors(pair):
    swapper = Swapper()
    with pytest.raises(RuntimeError, match="must be in"):
        swapper.swap_out([(1, 1), pair])
    with pytest.raises(RuntimeError, match="must be in"):
        swapper.swap_in([pair[::-1]])


def test_reading_a_place_never_written_is_an_error():
    swapper = Swapper()
    with pytest.raises(RuntimeError, match="nothing was swapped out to"):
        swapper.swap_in([(1, 1)])
    swapper.swap_out([(1, 1)])
    swapper.swapper.reset()
    with pytest.raises(RuntimeError, match="nothing was swapped out to"):
        swapper.swap_in([(1, 1)])
