"""Moves of blocks between the device's pool and the host's: which, and what each then refers to.

Decides nothing and copies nothing: the copies are queued, and the step being built carries them
out before anything else, all to the host first. Blocks keep their hashes on both sides. So what is
already there is referred to and not copied, and as a tier of the prefix cache the host only needs
to be told what is evicted, and to bring back what is looked up.
"""

from collections.abc import Iterable
from itertools import chain

from jpaged.block_pool import BlockPool
from jpaged.host_pool import HostBlockPool

Tables = list[list[int]]
Copies = list[tuple[int, int]]
"""Pairs of source and destination."""


class HostTier:
    """The host pool beside a device's pool.

    Attributes:
        pool: the host's blocks.
        num_swapped_out: blocks copied to the host so far.
        num_swapped_in: blocks copied to the device so far.
        num_fetched: blocks that lookups of the prefix cache brought back so far.
    """

    def __init__(self, device_pool: BlockPool, num_blocks: int, keeps_content: bool) -> None:
        """Makes a host pool of `num_blocks`; with `keeps_content` it keeps what the device evicts.

        Raises:
            ValueError: if there is not a single block.
        """
        self.pool = HostBlockPool(num_blocks, device_pool.block_size, keeps_content)
        self.num_swapped_out = 0
        self.num_swapped_in = 0
        self.num_fetched = 0
        self._device_pool = device_pool
        self._outs: Copies = []
        # Destination to source: a block that is handed out again gets only the last content.
        self._ins: dict[int, int] = {}
        # Host blocks, with repetitions, that must not change before the queued copies are made.
        self._reading: list[int] = []
        if keeps_content:
            device_pool.on_evict = self._keep

    def store(self, tables: Tables) -> Tables | None:
        """Host blocks for a group's blocks, shared as those are; None for lack of room.

        The group keeps its blocks of the device; whoever frees them may do so at once.
        """
        moved = _move(tables, self._device_pool, self.pool)
        if moved is None:
            return None
        found, copies = moved
        assert self._ins.keys().isdisjoint(block_id for block_id, _ in copies), (
            f"swapped out before what was swapped in has arrived: {copies}"
        )
        self._outs.extend(copies)
        return found

    def load(self, tables: Tables) -> Tables | None:
        """Blocks of the device for a group's host blocks, which it gives up; None for lack of room.

        Nothing changes when None is returned.
        """
        moved = _move(tables, self.pool, self._device_pool)
        if moved is None:
            return None
        found, copies = moved
        self._ins.update((block_id, place) for place, block_id in copies)
        self._reading.extend(chain.from_iterable(tables))
        return found

    def num_blocks_to_load(self, tables: Tables) -> int:
        """Free blocks of the device that `load` would take."""
        cached, blocks = self._device_pool.cached, self._device_pool.blocks
        num_blocks = 0
        for place in _unique(tables):
            block_hash = self.pool.blocks[place].block_hash
            block_id = None if block_hash is None else cached.get(block_hash)
            num_blocks += block_id is None or blocks[block_id].ref_count == 0
        return num_blocks

    def free(self, table: list[int]) -> None:
        """Drops a swapped-out sequence's references to its host blocks."""
        self.pool.free(table)

    def fetch(self, hashes: Iterable[bytes]) -> list[int]:
        """Brings what the host has of a chain of hashes back into the device's prefix cache.

        Up to the first block that neither has, and while there is room. Returns the blocks, which
        are free: for whoever looks them up, or evicted in their turn.
        """
        device = self._device_pool
        run: list[int] = []
        copies: Copies = []
        for block_hash in hashes:
            block_id, place = device.cached.get(block_hash), self.pool.cached.get(block_hash)
            if block_id is None and place is None:
                break
            if block_id is not None:
                device.touch([block_id])
            elif place is not None:
                # Held first: what is evicted for it goes to the host as well.
                self.pool.touch([place])
                self._reading.append(place)
                new_ids = device.allocate(1)
                if new_ids is None:
                    break
                block_id = new_ids[0]
                device.register(block_id, block_hash)
                copies.append((place, block_id))
            assert block_id is not None
            run.append(block_id)
        self._ins.update((block_id, place) for place, block_id in copies)
        self.num_fetched += len(copies)
        device.free(run)
        return run

    def take(self) -> tuple[Copies, Copies]:
        """Takes the queued copies: those to the host, and those from there, in this order."""
        if not (self._outs or self._ins or self._reading):
            return [], []
        outs, ins = self._outs, [(place, block_id) for block_id, place in self._ins.items()]
        reading, self._outs, self._ins, self._reading = self._reading, [], {}, []
        self.pool.free(reading)
        self.num_swapped_out += len(outs)
        self.num_swapped_in += len(ins)
        return outs, ins

    def check_invariants(self, tables: Iterable[list[int]]) -> None:
        """Recomputes everything from scratch, given the host blocks of all who hold any.

        Raises:
            AssertionError: on a bug of ours, with both sides of the equation that does not hold.
        """
        self.pool.check_invariants()
        owners = [0] * self.pool.num_blocks
        owners[self.pool.NULL_BLOCK] = 1
        for place in chain(self._reading, *tables):
            owners[place] += 1
        counts = [block.ref_count for block in self.pool.blocks]
        assert counts == owners, f"ref counts != occurrences: {counts} != {owners}"
        for place in self._ins.values():
            assert counts[place] > 0, f"host block {place} is to be read but free"
        if not self.pool.keeps_content:
            for place in self.pool.cached.values():
                assert counts[place] > 0, f"host block {place} is unused and still findable"

    def _keep(self, block_id: int, block_hash: bytes) -> None:
        """Keeps a cached block that the device is about to hand out again, if there is room."""
        place, source = self.pool.cached.get(block_hash), self._ins.pop(block_id, None)
        if place is not None:
            self.pool.refresh(place)
            return
        if source is not None:  # It was to come back in this very step: it still is there.
            if self.pool.blocks[source].block_hash is None:
                self.pool.register(source, block_hash)
            return
        places = self.pool.allocate(1)
        if places is None:
            return
        self.pool.register(places[0], block_hash)
        self.pool.free(places)
        self._outs.append((block_id, places[0]))


def _unique(tables: Tables) -> dict[int, None]:
    return dict.fromkeys(chain.from_iterable(tables))


def _move(tables: Tables, source: BlockPool, target: BlockPool) -> tuple[Tables, Copies] | None:
    """Tables of the target pool equal to tables of the source, and the copies that takes.

    A block that occurs in several tables is moved once and has as many references afterwards. A
    block whose content the target knows is not copied. None, and no effect, for lack of room.
    """
    found: dict[int, int] = {}
    new: list[int] = []
    for block_id in _unique(tables):
        block_hash = source.blocks[block_id].block_hash
        known = None if block_hash is None else target.cached.get(block_hash)
        if known is None:
            new.append(block_id)
        else:
            found[block_id] = known
    num_revived = sum(target.blocks[known].ref_count == 0 for known in found.values())
    if len(new) + num_revived > target.num_free_blocks:
        return None
    target.touch(list(found.values()))
    new_ids = target.allocate(len(new))
    assert new_ids is not None, "counted above"
    copies = list(zip(new, new_ids, strict=True))
    for block_id, new_id in copies:
        block_hash = source.blocks[block_id].block_hash
        if block_hash is not None:
            target.register(new_id, block_hash)
        found[block_id] = new_id
    # Every block has one reference so far, its first owner's.
    owned: set[int] = set()
    for block_id in chain.from_iterable(tables):
        if block_id in owned:
            target.touch([found[block_id]])
        owned.add(block_id)
    return [[found[block_id] for block_id in table] for table in tables], copies
