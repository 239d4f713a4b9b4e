"""The asynchronous API: the engine steps in a thread of its own, requests are async iterators."""

import asyncio
import collections
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

from jpaged import platform
from jpaged.engine import Engine, EngineStats
from jpaged.engine_config import EngineConfig
from jpaged.errors import EngineDeadError
from jpaged.outputs import RequestOutput
from jpaged.prompts import Prompt
from jpaged.sampling_params import SamplingParams
from jpaged.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class _Stream:
    """Where a request's outputs go: a queue of the caller's event loop."""

    def __init__(self) -> None:
        self.is_aborted = False
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()

    def put(self, item: RequestOutput | BaseException) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:
            logger.debug("an output came after its event loop was closed")

    async def get(self) -> RequestOutput:
        item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item


class AsyncLLM:
    """A model whose requests run together, each an async iterator of its outputs.

    Args:
        model: See `EngineConfig.model`; None is the embedded default model.
        **options: Any other field of `EngineConfig`.

    Raises:
        ValueError: An option is unknown or out of range, or the model cannot be loaded.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self.engine = Engine(EngineConfig.from_options(model=model, **options))
        self._request_ids = itertools.count()
        self._streams: dict[str, _Stream] = {}
        self._cancelled: list[str] = []
        # Calls for the engine's thread, the only one that touches the engine's state.
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._error: BaseException | None = None
        self.engine.on_host_lost(self._notify)
        self._thread = threading.Thread(target=self._work, name="jpaged-engine", daemon=True)
        self._thread.start()
        # Python does not wait for the thread, and JAX aborts a process that ends during a step.
        platform.call_at_exit(self.shutdown)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of a request as they come, per `SamplingParams.output_kind`.

        Leaving the iterator early, or cancelling the task that reads it, aborts the request and
        frees its blocks.

        Raises:
            ValueError: Prompt or parameters are out of range, or the id is in use.
            EngineDeadError: The engine has ended with an error.
        """
        if priority and self.engine.config.policy != "priority":
            raise ValueError('priority needs an engine with policy="priority"')
        self._check_alive()
        request_id = f"request-{next(self._request_ids)}" if request_id is None else request_id
        if request_id in self._streams:
            raise ValueError(
                f"request_id {request_id!r} is already in use by an unfinished request"
            )
        params = sampling_params or SamplingParams(**self.engine.default_sampling)
        # The id is taken before the first await, so that no other call can take it too.
        stream = self._streams[request_id] = _Stream()
        queued = finished = False
        try:
            # Once more: only an engine that dies from here on finds the stream and ends it.
            self._check_alive()
            # Tokenising a long prompt takes a while and must not hold up the event loop.
            request = await asyncio.to_thread(
                self.engine.make_request, request_id, prompt, params, priority=priority
            )
            self._call(lambda: self._add(request, stream))
            queued = True
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            if queued and not finished:
                self._call(lambda: self._cancel(request_id))
            else:
                del self._streams[request_id]

    async def abort(self, request_id: str) -> None:
        """Ends a request; its iterator gets a last output with finish reason "abort"."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.is_aborted = True
            self._call(lambda: self._abort(request_id))

    async def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        return self.engine.tokenizer

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if nothing more can run."""
        self._check_alive()

    def stats(self) -> EngineStats:
        """A snapshot of the engine's counters."""
        for _ in range(100):
            try:
                return self.engine.stats()
            except (RuntimeError, IndexError):  # the engine's thread changed what was being read
                continue
        return self.engine.stats()

    @property
    def is_running(self) -> bool:
        """Whether requests can run."""
        return self._error is None and not self._stopping

    def shutdown(self) -> None:
        """Ends the engine's thread; open iterators end with `EngineDeadError`."""
        with self._wake:
            if self._stopping:
                return
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self._fail_streams(EngineDeadError("the engine was shut down"))
        self.engine.shutdown()

    def _check_alive(self) -> None:
        if self._error is not None:
            raise EngineDeadError(f"the engine has ended with an error: {self._error}")
        if self._stopping:
            raise EngineDeadError("the engine was shut down")

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _call(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._calls.append(call)
            self._wake.notify()

    def _add(self, request: Any, stream: _Stream) -> None:
        try:
            self.engine.add_request(request)
        except ValueError as error:
            stream.put(error)
        else:
            if stream.is_aborted:  # while its prompt was being read
                self._abort(request.request_id)

    def _abort(self, request_id: str) -> None:
        self.engine.abort_request(request_id)

    def _cancel(self, request_id: str) -> None:
        self._abort(request_id)
        self._cancelled.append(request_id)

    def _work(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(
                        lambda: self._stopping or self._calls or self.engine.has_unfinished
                    )
                    if self._stopping:
                        return
                    calls, self._calls = self._calls, collections.deque()
                for call in calls:
                    call()
                for output in self.engine.step():
                    stream = self._streams.get(output.request_id)
                    if stream is not None:
                        stream.put(output)
                # Not before, or whoever takes the id next would get the old request's end.
                for request_id in self._cancelled:
                    del self._streams[request_id]
                self._cancelled.clear()
        except Exception as error:
            logger.exception("the engine has ended with an error")
            self._error = error
            self._fail_streams(EngineDeadError(f"the engine has ended with an error: {error}"))

    def _fail_streams(self, error: BaseException) -> None:
        for stream in list(self._streams.values()):
            stream.put(error)
