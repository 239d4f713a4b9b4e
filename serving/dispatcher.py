"""Which requests the engine has, which wait for it, and where what it brings belongs.

Between the engine's process (`send` and messages) and the streams of its client; no tasks, no
waiting.
"""

import itertools
import logging
from collections.abc import Callable
from typing import TypeVar

from jpaged.errors import QueueFullError
from jpaged.serving import messages
from jpaged.serving.admission import AdmissionQueue
from jpaged.serving.engine import EngineInfo
from jpaged.serving.mirror import Mirror
from jpaged.serving.stream import Stream

logger = logging.getLogger(__name__)

_Told = TypeVar("_Told")


class Dispatcher:
    """The requests of one engine.

    Attributes:
        queue: those that wait to be handed over.
        running: those that the engine has, by handle.
        num_running_seqs: how many sequences these are.
        num_being_read: requests whose prompts are being read; they will want to wait.
        num_rejected: requests that were too many.

    Args:
        queue: empty.
        send: tells the engine something.
        info: of the engine.
    """

    def __init__(
        self,
        queue: AdmissionQueue[Stream],
        send: Callable[[messages.ToEngine], None],
        info: EngineInfo,
    ) -> None:
        self.queue = queue
        self.running: dict[int, Stream] = {}
        self.num_running_seqs = 0
        self.num_being_read = 0
        self.num_rejected = 0
        self._send = send
        self._info = info
        self._handles = itertools.count()

    def check_room(self, num_tokens: int = 0) -> None:
        """Raises `QueueFullError` if a request of so many prompt tokens may not even wait."""
        if not (self.queue.num_waiting or self.num_being_read) and self._has_room:
            return
        try:
            self.queue.check_room(num_tokens, self.num_being_read)
        except QueueFullError:
            self.num_rejected += 1
            raise

    def put(self, stream: Stream, mirror: Mirror, key: str | None) -> None:
        """Takes a request whose prompt has been read; hands it over as soon as it is its turn.

        Raises:
            QueueFullError: Too much waits already.
        """
        request = mirror.request
        num_tokens = len(request.prompt_token_ids)
        self.check_room(num_tokens)
        stream.mirror = mirror
        stream.num_seqs = len(request.sequences)
        if stream.is_aborted:  # while its prompt was being read
            self.abort(stream)
            return
        num_output = request.max_length(self._info.max_model_len) - num_tokens
        stream.ticket = self.queue.put(
            stream,
            key=key,
            priority=request.priority,
            cost=num_tokens + stream.num_seqs * num_output,
            num_tokens=num_tokens,
        )
        self._hand_over()

    def abort(self, stream: Stream) -> None:
        """Ends a request now; of a beam search the engine says what it has found."""
        stream.is_aborted = True
        mirror = stream.mirror
        if mirror is None or mirror.is_finished:
            return
        if stream.handle in self.running:
            self._send(messages.Abort(stream.handle))
            if mirror.request.is_beam_search:
                return
            self._take_out(stream)
        elif stream.ticket is not None:
            self.queue.cancel(stream.ticket)
        mirror.abort()
        stream.wake()

    def leave(self, stream: Stream) -> None:
        """Forgets a request that nobody reads any more."""
        if stream.ticket is not None:
            self.queue.cancel(stream.ticket)
        if stream.handle in self.running:
            self._send(messages.Abort(stream.handle))
            self._take_out(stream)

    def reject(self, rejected: messages.Rejected) -> None:
        """Ends a request that the engine does not take."""
        stream = self.running.get(rejected.handle)
        if stream is not None:
            stream.fail(ValueError(rejected.message))
            self._take_out(stream)

    def deliver(self, step: messages.StepTokens) -> None:
        """Gives each request what a step has brought."""
        for progress in step.progress:
            self._tell(progress.handle, Mirror.take_progress, progress)
        for handle, found in step.prompt_logprobs.items():
            self._tell(handle, Mirror.take_prompt_logprobs, found)
        running, logprobs, ends = self.running, step.logprobs, step.ends
        tokens = zip(step.handles, step.seq_indices, step.token_ids, strict=True)
        for place, (handle, seq_index, token_id) in enumerate(tokens):
            stream = running.get(handle)
            if stream is None:
                continue  # It was aborted or has failed; its last tokens still come.
            assert stream.mirror is not None, "handed over before its prompt was read"
            try:
                is_cut = stream.mirror.take_token(
                    seq_index, token_id, logprobs.get(place), ends.get(place)
                )
            except Exception as error:
                self._fail(stream, error)
            else:
                if is_cut:
                    self._send(messages.EndSequence(handle, seq_index))
        for handle, found in step.hypotheses.items():
            self._tell(handle, Mirror.take_hypotheses, found)
        for handle in dict.fromkeys([*step.handles, *step.hypotheses]):
            stream = running.get(handle)
            if stream is not None:
                stream.wake()
                if stream.is_finished:
                    self._take_out(stream)

    @property
    def _has_room(self) -> bool:
        """Whether the engine takes more: all that it can run, and some to fill in at once.

        What waits inside the engine is out of reach of fairness between keys.
        """
        most = self._info.max_num_seqs
        return self.num_running_seqs < most + most // 4 + 1

    def _hand_over(self) -> None:
        """Gives the engine what it has room for."""
        while self.queue.num_waiting and self._has_room:
            ticket = self.queue.take()
            assert ticket is not None, "some wait"
            stream = ticket.item
            assert stream.mirror is not None, "queued before its prompt was read"
            request = stream.mirror.request
            stream.handle = next(self._handles)
            self.running[stream.handle] = stream
            self.num_running_seqs += stream.num_seqs
            try:
                self._send(
                    messages.Add(
                        stream.handle,
                        request.request_id,
                        request.prompt_token_ids,
                        messages.pack_params(stream.mirror.params),
                        request.priority,
                        request.cache_salt,
                    )
                )
            except (OverflowError, TypeError, ValueError) as error:  # no message can carry it
                del self.running[stream.handle]
                self.num_running_seqs -= stream.num_seqs
                stream.fail(ValueError(f"the request cannot be sent to the engine: {error}"))

    def _take_out(self, stream: Stream) -> None:
        """Notes that the engine does not have a request any more."""
        if self.running.pop(stream.handle, None) is not None:
            self.num_running_seqs -= stream.num_seqs
            self._hand_over()

    def _tell(self, handle: int, take: Callable[[Mirror, _Told], None], value: _Told) -> None:
        """Gives what came to the request's mirror."""
        stream = self.running.get(handle)
        if stream is not None and stream.mirror is not None:
            try:
                take(stream.mirror, value)
            except Exception as error:
                self._fail(stream, error)

    def _fail(self, stream: Stream, error: Exception) -> None:
        """Ends a request whose text cannot be made; the others go on."""
        logger.error("the output of a request could not be made", exc_info=error)
        stream.fail(RuntimeError(f"the output could not be made: {error}"))
        self._send(messages.Abort(stream.handle))
        self._take_out(stream)
