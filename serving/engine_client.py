"""The engine as the HTTP process has it: texts here, tokens in a process of their own.

Prompts are tokenised and texts made in this process; the engine's is given token ids and gives
token ids. All of this runs in one event loop, but for long prompts, which threads tokenise. Nothing
here imports JAX.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

from jpaged.errors import EngineDeadError, QueueFullError
from jpaged.outputs import RequestOutput
from jpaged.prompts import Prompt
from jpaged.request import Request
from jpaged.request_reader import RequestLimits, RequestReader
from jpaged.sampling_params import SamplingParams
from jpaged.serving import messages
from jpaged.serving.admission import AdmissionQueue
from jpaged.serving.engine import EngineInfo
from jpaged.serving.engine_link import ENGINE_COMMAND, EngineLink
from jpaged.serving.logs import LogFormat
from jpaged.serving.mirror import Mirror
from jpaged.serving.stream import Stream
from jpaged.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_Told = TypeVar("_Told")
_LONG_PROMPT = 2048
"""Characters, or token ids, from which a prompt is read in a thread."""
_NUM_READERS = 2


class EngineProcessClient:
    """An `EngineClient` over an engine in a process of its own; made by `start`.

    Args:
        max_num_queued_reqs: Most requests that wait for the engine to take them; None: no limit.
        max_num_queued_tokens: Most prompt tokens of those.
    """

    def __init__(
        self,
        *,
        max_num_queued_reqs: int | None = None,
        max_num_queued_tokens: int | None = None,
    ) -> None:
        self._queue = AdmissionQueue[Stream](max_num_queued_reqs, max_num_queued_tokens)
        self._streams: dict[str, Stream] = {}
        # Those that the engine has, by handle, and how many sequences they are.
        self._running: dict[int, Stream] = {}
        self._num_running_seqs = 0
        self._num_being_read = 0
        self._num_rejected = 0
        self._handles = itertools.count()
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._call_ids = itertools.count()
        self._threads = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="jpaged-reader")
        self._ready: asyncio.Future[messages.Ready] = asyncio.get_running_loop().create_future()
        self._dead = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._error: str | None = None
        self._is_closing = False
        self._info: EngineInfo | None = None
        self._reader: RequestReader | None = None
        self._link: EngineLink | None = None

    @classmethod
    async def start(
        cls,
        options: Mapping[str, Any],
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        log_level: str = "warning",
        log_format: LogFormat = "text",
        **limits: int | None,
    ) -> Self:
        """Starts an engine and waits until requests may come.

        Args:
            options: Of `EngineConfig`.
            command: The program that is the engine.
            log_level: Of the engine's process, which logs to the same standard error.
            log_format: See `logging_to_stderr`.
            **limits: Of the class.

        Raises:
            ValueError: The options are wrong, or the model cannot be loaded; one line.
            EngineDeadError: The process ended while it started.
        """
        self = cls(**limits)
        self._link = EngineLink(self._on_message, self._on_exit, command)
        try:
            self._link.send(messages.Start(dict(options), log_level, log_format))
            ready = await self._ready
            tokenizer = None
            if ready.tokenizer_source is not None:
                tokenizer = await asyncio.to_thread(load_tokenizer, ready.tokenizer_source)
        except BaseException:
            self._ready.cancel()
            self._link.kill()
            raise
        info = self._info = ready.info
        limits_of_requests = RequestLimits(
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            max_num_seqs=info.max_num_seqs,
            max_logprobs=info.max_logprobs,
            eos_token_ids=info.eos_token_ids,
        )
        self._reader = RequestReader(limits_of_requests, tokenizer)
        return self

    @property
    def info(self) -> EngineInfo:
        """What is fixed once the engine runs."""
        assert self._info is not None, "made by `start` only"
        return self._info

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        assert self._reader is not None, "made by `start` only"
        return self._reader.tokenizer

    @property
    def engine_pid(self) -> int:
        """Id of the engine's process."""
        return self._open_link.pid

    async def wait_dead(self) -> str:
        """Waits until the engine has ended against our will; says why."""
        await self._dead.wait()
        assert self._error is not None, "an engine that is dead has a reason"
        return self._error

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        fairness_key: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of a request as they come; leaving early aborts it and frees its blocks.

        Raises:
            ValueError: Prompt or parameters are out of range, or the id is in use.
            QueueFullError: Too much waits already.
            EngineDeadError: The engine has ended.
        """
        self._check_alive()
        if priority and self.info.policy != "priority":
            raise ValueError('priority needs an engine with policy="priority"')
        if request_id in self._streams:
            raise ValueError(
                f"request_id {request_id!r} is already in use by an unfinished request"
            )
        self._check_room(0)
        stream = self._streams[request_id] = Stream()
        self._idle.clear()
        try:
            request = await self._read(request_id, prompt, params, priority)
            self._check_alive()
            self._put(stream, request, params, fairness_key)
            finished = False
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            self._leave(request_id, stream)

    async def abort(self, request_id: str) -> None:
        """Ends a request; its iterator gets a last output with finish reason "abort"."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._abort(stream)

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if nothing more can run."""
        self._check_alive()

    async def stats(self) -> dict[str, Any]:
        """The engine's counters by the names of `EngineStats`, and what waits in this process.

        `num_waiting` of the scheduler counts this process's queue too; `num_queued_reqs` and
        `num_queued_tokens` are the queue alone, `num_rejected_reqs` what was too much for it.
        `step_tokens` is a histogram over `messages.STEP_TOKEN_BOUNDS`.
        """
        stats = await self._ask("stats")
        stats["scheduler"]["num_waiting"] += self._queue.num_waiting
        return stats | {
            "num_queued_reqs": self._queue.num_waiting,
            "num_queued_tokens": self._queue.num_tokens,
            "num_rejected_reqs": self._num_rejected,
        }

    async def pool_view(self) -> dict[str, Any]:
        """The block pool as plain data, for the live picture."""
        return await self._ask("pool_view")

    async def shutdown(self, timeout_s: float = 0.0) -> None:
        """Refuses new requests, lets open ones go on for that long, then ends them."""
        self._is_closing = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            for stream in self._streams.values():
                self._abort(stream)
        await self._open_link.close()
        self._threads.shutdown(wait=False)

    def kill(self) -> None:
        """Ends the engine at once; open iterators end with `EngineDeadError`."""
        self._is_closing = True
        self._open_link.kill()

    @property
    def _open_link(self) -> EngineLink:
        assert self._link is not None, "made by `start` only"
        return self._link

    def _check_alive(self) -> None:
        if self._error is not None:
            raise EngineDeadError(self._error)
        if self._is_closing:
            raise EngineDeadError("the engine is shutting down")

    # Requests.

    async def _read(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int
    ) -> Request:
        reader = self._reader
        assert reader is not None, "made by `start` only"
        parts = prompt.values() if isinstance(prompt, Mapping) else (prompt,)
        if all(len(part) < _LONG_PROMPT for part in parts if isinstance(part, (str, Sequence))):
            return reader.read(request_id, prompt, params, priority=priority)
        self._num_being_read += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads,
                lambda: reader.read(request_id, prompt, params, priority=priority),
            )
        finally:
            self._num_being_read -= 1

    @property
    def _has_room(self) -> bool:
        """Whether the engine takes more: all that it can run, and some to fill in at once.

        What waits inside the engine is out of reach of fairness between keys.
        """
        most = self.info.max_num_seqs
        return self._num_running_seqs < most + most // 4 + 1

    def _check_room(self, num_tokens: int) -> None:
        if not (self._queue.num_waiting or self._num_being_read) and self._has_room:
            return
        try:
            self._queue.check_room(num_tokens, self._num_being_read)
        except QueueFullError:
            self._num_rejected += 1
            raise

    def _put(
        self, stream: Stream, request: Request, params: SamplingParams, key: str | None
    ) -> None:
        num_tokens = len(request.prompt_token_ids)
        self._check_room(num_tokens)
        stream.mirror = Mirror(request, params, self.tokenizer)
        stream.num_seqs = len(request.sequences)
        if stream.is_aborted:  # while its prompt was being read
            self._abort(stream)
            return
        num_output = request.max_length(self.info.max_model_len) - num_tokens
        stream.ticket = self._queue.put(
            stream,
            key=key,
            priority=request.priority,
            cost=num_tokens + stream.num_seqs * num_output,
            num_tokens=num_tokens,
        )
        self._hand_over()

    def _hand_over(self) -> None:
        """Gives the engine what it has room for."""
        while self._queue.num_waiting and self._has_room:
            ticket = self._queue.take()
            assert ticket is not None, "some wait"
            stream = ticket.item
            assert stream.mirror is not None, "queued before its prompt was read"
            request = stream.mirror.request
            stream.handle = next(self._handles)
            self._running[stream.handle] = stream
            self._num_running_seqs += stream.num_seqs
            self._open_link.send(
                messages.Add(
                    stream.handle,
                    request.request_id,
                    request.prompt_token_ids,
                    stream.mirror.params,
                    request.priority,
                    request.cache_salt,
                )
            )

    def _abort(self, stream: Stream) -> None:
        """Ends a request now; of a beam search the engine says what it has found."""
        stream.is_aborted = True
        mirror = stream.mirror
        if mirror is None or mirror.is_finished:
            return
        if stream.handle in self._running:
            self._open_link.send(messages.Abort(stream.handle))
            if mirror.request.is_beam_search:
                return
            self._take_out(stream)
        elif stream.ticket is not None:
            self._queue.cancel(stream.ticket)
        mirror.abort()
        stream.wake()

    def _take_out(self, stream: Stream) -> None:
        """Notes that the engine does not have a request any more."""
        if self._running.pop(stream.handle, None) is not None:
            self._num_running_seqs -= stream.num_seqs
            self._hand_over()

    def _leave(self, request_id: str, stream: Stream) -> None:
        """Forgets a request that nobody reads any more."""
        if stream.ticket is not None:
            self._queue.cancel(stream.ticket)
        if stream.handle in self._running:
            self._open_link.send(messages.Abort(stream.handle))
            self._take_out(stream)
        del self._streams[request_id]
        if not self._streams:
            self._idle.set()

    # What the engine says.

    async def _ask(self, what: str) -> dict[str, Any]:
        self._check_alive()
        call = next(self._call_ids)
        answer = self._calls[call] = asyncio.get_running_loop().create_future()
        try:
            self._open_link.send(messages.Ask(call, what))
            return await answer
        finally:
            del self._calls[call]

    def _on_message(self, message: messages.FromEngine) -> None:
        match message:
            case messages.StepTokens():
                self._on_step(message)
            case messages.Rejected(handle, text):
                stream = self._running.get(handle)
                if stream is not None:
                    stream.fail(ValueError(text))
                    self._take_out(stream)
            case messages.Answer(call, value):
                answer = self._calls.get(call)
                if answer is not None and not answer.done():
                    answer.set_result(value)
            case messages.Ready():
                self._ready.set_result(message)
            case messages.Failed(text, is_users_fault):
                if is_users_fault and not self._ready.done():
                    self._ready.set_exception(ValueError(text))
                self._error = text

    def _on_step(self, step: messages.StepTokens) -> None:
        for progress in step.progress:
            self._tell(progress.handle, Mirror.take_progress, progress)
        for handle, found in step.prompt_logprobs.items():
            self._tell(handle, Mirror.take_prompt_logprobs, found)
        running, logprobs, ends = self._running, step.logprobs, step.ends
        tokens = zip(step.handles, step.seq_indices, step.token_ids, strict=True)
        for place, (handle, seq_index, token_id) in enumerate(tokens):
            # Of one that was aborted or has failed tokens may still come.
            if handle in running and self._tell(
                handle, Mirror.take_token, seq_index, token_id, logprobs.get(place), ends.get(place)
            ):
                self._open_link.send(messages.EndSequence(handle, seq_index))
        for handle, found in step.hypotheses.items():
            self._tell(handle, Mirror.take_hypotheses, found)
        for handle in dict.fromkeys([*step.handles, *step.hypotheses]):
            stream = running.get(handle)
            if stream is not None:
                stream.wake()
                if stream.is_finished:
                    self._take_out(stream)

    def _tell(self, handle: int, take: Callable[..., _Told], *values: Any) -> _Told | None:
        """Gives what came to the request's mirror; a failure there is that request's alone."""
        stream = self._running.get(handle)
        if stream is None or stream.mirror is None:
            return None
        try:
            return take(stream.mirror, *values)
        except Exception as error:
            logger.exception("the output of a request could not be made")
            stream.fail(RuntimeError(f"the output could not be made: {error}"))
            self._open_link.send(messages.Abort(handle))
            self._take_out(stream)
            return None

    def _on_exit(self, code: int) -> None:
        if self._is_closing and self._error is None:
            text = "the engine was shut down"
        else:
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            text = self._error or f"the engine's process was ended {how}"
        self._error = text
        if not self._is_closing:
            self._dead.set()
        if not self._ready.done():
            self._ready.set_exception(EngineDeadError(text))
        for stream in self._streams.values():
            stream.fail(EngineDeadError(text))
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(EngineDeadError(text))
