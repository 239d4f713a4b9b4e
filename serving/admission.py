"""Who may wait, and whose turn it is: a bounded queue that is fair between clients.

Pure: no clock, no tasks. Requests of one key run by priority (lower first) and then by arrival. Of
several keys that wait, each gets the same share of tokens, whatever the number of its requests:
start-time fair queueing, where every key has a clock that runs by the tokens it was given, and the
key whose clock is furthest behind is next. A key that comes new starts at the clock of whoever was
served last, so that nobody saves up turns while away.
"""

import heapq
import itertools
from typing import Generic, TypeVar

from jpaged.errors import QueueFullError

Item = TypeVar("Item")
_MIN_CLOCKS = 16


class Ticket(Generic[Item]):
    """A place in the queue.

    Attributes:
        item: what waits.
        key: on whose account.
        cost: tokens that it may need, prompt and output.
        num_tokens: those of its prompt, which the queue's limit counts.
    """

    __slots__ = ("cost", "is_waiting", "item", "key", "num_tokens")

    def __init__(self, item: Item, key: str | None, cost: int, num_tokens: int) -> None:
        self.item = item
        self.key = key
        self.cost = cost
        self.num_tokens = num_tokens
        self.is_waiting = True


class _Line(Generic[Item]):
    """Those of one key that wait; cancelled ones stay in the heap until they outnumber the rest."""

    __slots__ = ("heap", "num_waiting")

    def __init__(self) -> None:
        self.heap: list[tuple[int, int, Ticket[Item]]] = []
        self.num_waiting = 0


class AdmissionQueue(Generic[Item]):
    """Requests that the engine has not been given yet.

    Args:
        max_requests: most requests that wait; None for no limit.
        max_tokens: most prompt tokens of all that wait; None for no limit. A request that is larger
            than this alone may still wait if nothing else does.
    """

    def __init__(self, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        self.num_waiting = 0
        self.num_tokens = 0
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._arrivals = itertools.count()
        self._lines: dict[str | None, _Line[Item]] = {}
        # The clocks of keys, as (clock, arrival, key); one entry for each key that waits. Of keys
        # that do not wait, only clocks ahead of `_now` matter.
        self._turns: list[tuple[int, int, str | None]] = []
        self._clocks: dict[str | None, int] = {}
        self._now = 0
        self._forget_at = _MIN_CLOCKS

    def check_room(self, num_tokens: int = 0, num_more: int = 0) -> None:
        """Raises `QueueFullError` if a request of so many prompt tokens may not wait.

        Args:
            num_tokens: of its prompt, as far as it is known.
            num_more: requests that are about to wait, and not counted yet.
        """
        if self._max_requests is not None and self.num_waiting + num_more >= self._max_requests:
            raise QueueFullError(
                f"the queue is full: max_num_queued_reqs={self._max_requests} requests are waiting"
            )
        if self._max_tokens is None or not self.num_waiting:
            return
        if self.num_tokens + num_tokens > self._max_tokens:
            raise QueueFullError(
                f"the queue is full: {self.num_tokens} prompt tokens are waiting, and "
                f"{num_tokens} more would exceed max_num_queued_tokens={self._max_tokens}"
            )

    def put(
        self, item: Item, *, key: str | None = None, priority: int = 0, cost: int, num_tokens: int
    ) -> Ticket[Item]:
        """Puts an item in line; limits are the caller's to check (`check_room`)."""
        ticket = Ticket(item, key, cost, num_tokens)
        arrival = next(self._arrivals)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line()
            clock = self._clocks[key] = max(self._clocks.get(key, 0), self._now)
            heapq.heappush(self._turns, (clock, arrival, key))
        heapq.heappush(line.heap, (priority, arrival, ticket))
        line.num_waiting += 1
        self.num_waiting += 1
        self.num_tokens += num_tokens
        return ticket

    def take(self) -> Ticket[Item] | None:
        """The next one in line, which waits no longer; None if nobody waits."""
        while self._turns:
            clock, _, key = heapq.heappop(self._turns)
            line = self._lines.get(key)
            if line is None or clock != self._clocks[key]:
                continue  # All of the key were cancelled.
            while not (ticket := heapq.heappop(line.heap)[2]).is_waiting:
                pass
            self._now = clock
            self._clocks[key] = clock + ticket.cost
            self._leave(ticket)
            if key in self._lines:
                heapq.heappush(self._turns, (clock + ticket.cost, next(self._arrivals), key))
            return ticket
        return None

    def cancel(self, ticket: Ticket[Item]) -> bool:
        """Takes one out of the line; False if it does not wait any more."""
        if not ticket.is_waiting:
            return False
        self._leave(ticket)
        line = self._lines.get(ticket.key)
        if line is not None and len(line.heap) > 2 * line.num_waiting + 8:
            line.heap = [entry for entry in line.heap if entry[2].is_waiting]
            heapq.heapify(line.heap)
        return True

    def _leave(self, ticket: Ticket[Item]) -> None:
        ticket.is_waiting = False
        self.num_waiting -= 1
        self.num_tokens -= ticket.num_tokens
        line = self._lines[ticket.key]
        line.num_waiting -= 1
        if line.num_waiting:
            return
        del self._lines[ticket.key]
        if not self._lines:
            # Nobody waits, so nobody was held up by what others were given.
            self._turns.clear()
            self._clocks.clear()
            self._now = 0
            self._forget_at = _MIN_CLOCKS
        elif max(len(self._clocks), len(self._turns)) > self._forget_at:
            self._forget()

    def _forget(self) -> None:
        """Drops the turns of those that were cancelled, and clocks that say nothing.

        These are of keys that do not wait, and are not ahead.
        """
        self._clocks = {
            key: clock
            for key, clock in self._clocks.items()
            if key in self._lines or clock > self._now
        }
        turns = {
            key: (clock, arrival, key)
            for clock, arrival, key in self._turns
            if key in self._lines and clock == self._clocks[key]
        }
        self._turns = list(turns.values())
        heapq.heapify(self._turns)
        self._forget_at = max(2 * len(self._clocks), _MIN_CLOCKS)
