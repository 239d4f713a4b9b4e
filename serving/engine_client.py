"""The engine as the HTTP process has it: texts here, tokens in a process of their own.

Prompts are tokenised and texts made in this process; the engine's is given token ids and gives
token ids. All of this runs in one event loop, but for long prompts, which threads tokenise. Nothing
here imports JAX.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from jpaged.errors import EngineDeadError
from jpaged.outputs import RequestOutput
from jpaged.prompts import Prompt
from jpaged.request import Request
from jpaged.request_reader import RequestLimits, RequestReader
from jpaged.sampling_params import SamplingParams
from jpaged.serving import messages
from jpaged.serving.admission import AdmissionQueue
from jpaged.serving.dispatcher import Dispatcher
from jpaged.serving.engine import EngineInfo
from jpaged.serving.engine_link import ENGINE_COMMAND, EngineLink
from jpaged.serving.logs import LogFormat
from jpaged.serving.mirror import Mirror
from jpaged.serving.stream import Stream
from jpaged.tokenizer import Tokenizer, load_tokenizer

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
        self._dispatcher: Dispatcher | None = None
        self._streams: dict[str, Stream] = {}
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
        self._dispatcher = Dispatcher(self._queue, self._link.send, info)
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
        self._requests.check_room()
        stream = self._streams[request_id] = Stream()
        self._idle.clear()
        try:
            request = await self._read(request_id, prompt, params, priority)
            self._check_alive()
            mirror = Mirror(request, params, self.tokenizer)
            self._requests.put(stream, mirror, fairness_key)
            finished = False
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            self._requests.leave(stream)
            del self._streams[request_id]
            if not self._streams:
                self._idle.set()

    async def abort(self, request_id: str) -> None:
        """Ends a request; its iterator gets a last output with finish reason "abort"."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._requests.abort(stream)

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
            "num_rejected_reqs": self._requests.num_rejected,
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
                self._requests.abort(stream)
        await self._open_link.close()
        self._threads.shutdown(wait=False)

    def kill(self) -> None:
        """Ends the engine at once; open iterators end with `EngineDeadError`."""
        self._is_closing = True
        self._open_link.kill()

    @property
    def _requests(self) -> Dispatcher:
        assert self._dispatcher is not None, "made by `start` only"
        return self._dispatcher

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
        self._requests.num_being_read += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads,
                lambda: reader.read(request_id, prompt, params, priority=priority),
            )
        finally:
            self._requests.num_being_read -= 1

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
                self._requests.deliver(message)
            case messages.Rejected():
                self._requests.reject(message)
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
