"""A buddy allocator of contiguous slots, as the paper gives its re-implementation of Orca."""


class BuddyAllocator:
    """Hands out areas of a power of two of slots, each at a multiple of its own size.

    A memory that is no power of two is a row of ever smaller areas of which none is larger than
    `max_size`. An area that is given back merges with its buddy, if that is free and whole.

    Attributes:
        num_slots: slots in all, rounded down to a multiple of `min_size`.
        min_size: the smallest area.
        max_size: the largest area.
    """

    def __init__(self, num_slots: int, min_size: int, max_size: int) -> None:
        """Starts with everything free.

        Raises:
            ValueError: if a size is no power of two, or they are out of order.
        """
        for name, size in (("min_size", min_size), ("max_size", max_size)):
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two, got {size}")
        if not min_size <= max_size:
            raise ValueError(f"min_size must be at most {max_size=}, got {min_size}")
        self.num_slots = num_slots - num_slots % min_size
        self.min_size = min_size
        self.max_size = max_size
        self._free: dict[int, set[int]] = {}
        size, start = max_size, 0
        while size >= min_size:
            self._free[size] = set()
            while start + size <= self.num_slots:
                self._free[size].add(start)
                start += size
            size //= 2
        self._sizes: dict[int, int] = {}
        self._num_free = self.num_slots

    @property
    def num_free_slots(self) -> int:
        """Slots in free areas, however scattered."""
        return self._num_free

    @property
    def areas(self) -> dict[int, int]:
        """Size of each allocated area by its start, as a copy."""
        return dict(self._sizes)

    def size_for(self, num_slots: int) -> int:
        """Slots of the area that `num_slots` slots take."""
        return max(self.min_size, 1 << (num_slots - 1).bit_length())

    def allocate(self, num_slots: int) -> int | None:
        """Start of a contiguous area of at least so many slots; None if there is none.

        Raises:
            ValueError: if no area is ever that large.
        """
        size = self.size_for(num_slots)
        if not 1 <= num_slots <= self.max_size:
            raise ValueError(f"num_slots must be in [1, {self.max_size}], got {num_slots}")
        found = size
        while not self._free[found]:
            if found == self.max_size:
                return None
            found *= 2
        # The lowest, so that runs are the same everywhere.
        start = min(self._free[found])
        self._free[found].remove(start)
        while found > size:
            found //= 2
            self._free[found].add(start + found)
        self._sizes[start] = size
        self._num_free -= size
        return start

    def free(self, start: int) -> None:
        """Gives an area back.

        Raises:
            KeyError: if none is allocated there.
        """
        size = self._sizes.pop(start)
        self._num_free += size
        while size < self.max_size and start ^ size in self._free[size]:
            self._free[size].remove(start ^ size)
            start &= ~size
            size *= 2
        self._free[size].add(start)

    def check_invariants(self) -> None:
        """Recomputes everything from scratch.

        Raises:
            AssertionError: if areas overlap or leave a gap, or two free buddies are not merged.
        """
        areas = [(start, size) for size, starts in self._free.items() for start in starts]
        free = sum(size for _, size in areas)
        assert free == self._num_free, f"free slots {self._num_free} != {free} in free areas"
        areas += self._sizes.items()
        end = 0
        for start, size in sorted(areas):
            assert start == end, f"gap or overlap at {end}: the next area starts at {start}"
            assert start % size == 0, f"area of {size} slots at {start}"
            end = start + size
        assert end == self.num_slots, f"areas end at {end} of {self.num_slots} slots"
        for size, starts in self._free.items():
            for start in starts if size < self.max_size else ():
                assert start ^ size not in starts, f"free buddies at {start} of {size} slots"
