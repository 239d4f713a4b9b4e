"""One request in the HTTP process, from its arrival to its end."""

import asyncio
from typing import TYPE_CHECKING

from jpaged.outputs import RequestOutput
from jpaged.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from jpaged.serving.admission import Ticket
    from jpaged.serving.mirror import Mirror


class Stream:
    """One request, from its arrival to its end; woken when there is something new to tell.

    What comes while nobody reads is told in one output, so an unread stream keeps no more than the
    request's own tokens.
    """

    def __init__(self) -> None:
        self.is_aborted = False
        self.handle = -1
        self.mirror: Mirror | None = None
        self.ticket: Ticket[Stream] | None = None
        self.num_seqs = 0
        self._is_new = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all its sequences have ended."""
        return self.mirror is not None and self.mirror.is_finished

    def wake(self) -> None:
        """Tells whoever reads that there is more."""
        mirror = self.mirror
        if mirror is not None and (
            mirror.is_finished or mirror.params.output_kind is not RequestOutputKind.FINAL_ONLY
        ):
            self._is_new = True
            self._release()

    def fail(self, error: BaseException) -> None:
        """Ends the iterator with an error, once it has told what came before."""
        self._error = error
        self._release()

    async def get(self) -> RequestOutput:
        """The next output, once there is something to tell."""
        while True:
            if self._is_new:
                self._is_new = False
                assert self.mirror is not None, "woken before its prompt was read"
                output = self.mirror.output()
                if output is not None:
                    return output
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _release(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
