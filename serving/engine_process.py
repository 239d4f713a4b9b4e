"""The engine's process: scheduler and device, no text. `python -m jpaged.serving.engine_process`.

Receives without blocking while there is work, and waits on its socket when there is none. It loads
the tokenizer all the same: the token ids of `bad_words` and the vocabulary of structured outputs
are the engine's, and their code is one with that of an engine in the caller's process.

Ends by itself as soon as its standard input is closed, that is, when the process that started it
has ended, however that came about.
"""

import bisect
import collections
import dataclasses
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from jpaged import structured_outputs
from jpaged.engine_config import EngineConfig
from jpaged.models.sources import DEFAULT_MODEL
from jpaged.pool_view import view_pool
from jpaged.request import Request
from jpaged.sampling_params import SamplingParams
from jpaged.serving import messages
from jpaged.serving.engine import EngineInfo
from jpaged.serving.engine_channel import Channel
from jpaged.serving.logs import logging_to_stderr
from jpaged.token_outputs import TokenOutputs

if TYPE_CHECKING:
    from jpaged.engine import Engine

logger = logging.getLogger(__name__)

_NUM_COMPILING = 2
_USERS_FAULTS = (ValueError, NotImplementedError, RuntimeError, ImportError, OSError)


@dataclasses.dataclass(slots=True)
class _Open:
    """A request that runs, and what the client knows of it."""

    handle: int
    request: Request
    has_begun: bool = False
    num_preemptions: int = 0


class EngineServer:
    """Runs an engine for the process at the other end of a channel."""

    def __init__(self, engine: "Engine", channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._by_handle: dict[int, _Open] = {}
        self._by_request: dict[Request, _Open] = {}
        # Requests whose grammars are compiled meanwhile; None once one was aborted.
        self._compiling: dict[int, messages.Add | None] = {}
        self._compiled: collections.deque[tuple[int, Future[Request]]] = collections.deque()
        self._threads = ThreadPoolExecutor(_NUM_COMPILING, thread_name_prefix="jpaged-grammar")

        # A histogram of the tokens of steps.
        self._step_counts = [0] * (len(messages.STEP_TOKEN_BOUNDS) + 1)
        self._num_step_tokens = 0

    def serve(self) -> None:
        """Runs until it is told to stop."""
        engine, channel = self._engine, self._channel
        engine.on_host_lost(channel.wake)
        while True:
            for message in channel.receive(wait=not engine.has_unfinished):
                if isinstance(message, messages.Stop):
                    return
                self._handle(message)
            while self._compiled:
                self._take_compiled(*self._compiled.popleft())
            if engine.has_unfinished and (step := self._step()) is not None:
                channel.send(step)

    def _handle(self, message: messages.ToEngine) -> None:
        match message:
            case messages.Add():
                self._add(message)
            case messages.Abort(handle) if handle in self._compiling:
                self._compiling[handle] = None
            case messages.Abort(handle):
                if (opened := self._by_handle.get(handle)) is not None:
                    self._engine.abort_request(opened.request.request_id)
            case messages.EndSequence(handle, seq_index):
                if (opened := self._by_handle.get(handle)) is not None:
                    self._engine.end_sequence(opened.request.request_id, seq_index)
                    if opened.request.is_finished:
                        self._forget(opened)
            case messages.Ask(call, what):
                self._channel.send(messages.Answer(call, self._answer(what)))

    def _add(self, message: messages.Add) -> None:
        if "structured_outputs" not in message.params:
            self._queue(message.handle, lambda: self._make_request(message))
            return
        # A grammar may take seconds to compile, and the others' steps must go on.
        handle = message.handle
        self._compiling[handle] = message
        future = self._threads.submit(self._make_request, message)
        future.add_done_callback(lambda done: self._note_compiled(handle, done))

    def _make_request(self, message: messages.Add) -> Request:
        return self._engine.make_request(
            message.request_id,
            {"prompt_token_ids": message.prompt_token_ids, "cache_salt": message.cache_salt},
            SamplingParams(**message.params),
            priority=message.priority,
        )

    def _note_compiled(self, handle: int, done: "Future[Request]") -> None:
        self._compiled.append((handle, done))
        self._channel.wake()

    def _take_compiled(self, handle: int, done: "Future[Request]") -> None:
        if self._compiling.pop(handle) is not None:
            self._queue(handle, done.result)

    def _queue(self, handle: int, make: Callable[[], Request]) -> None:
        try:
            request = make()
            self._engine.add_request(request)
        except ValueError as error:
            self._channel.send(messages.Rejected(handle, str(error)))
            return
        except Exception as error:  # ours or a library's, but not a reason to end all requests
            logger.exception("a request could not be read")
            self._channel.send(messages.Rejected(handle, f"the request cannot run: {error}"))
            return
        self._by_handle[handle] = self._by_request[request] = _Open(handle, request)

    def _forget(self, opened: _Open) -> None:
        del self._by_handle[opened.handle], self._by_request[opened.request]

    def _answer(self, what: str) -> dict:
        if what == "stats":
            steps = {"counts": self._step_counts, "sum": self._num_step_tokens}
            return dataclasses.asdict(self._engine.stats()) | {"step_tokens": steps}
        return view_pool(self._engine.block_manager).as_dict()

    def _step(self) -> messages.StepTokens | None:
        """Runs a step; what it brought, if anything."""
        found = messages.StepTokens([], [], [], {}, {}, [], {}, {})
        touched = self._engine.advance()
        self._note_step(self._engine.num_step_tokens)
        for request in touched:
            opened = self._by_request.get(request)
            if opened is not None:
                self._report(opened, found)
                if request.is_finished:
                    self._forget(opened)
        return found if found.handles or found.hypotheses else None

    def _note_step(self, num_tokens: int) -> None:
        if num_tokens:
            self._step_counts[bisect.bisect_left(messages.STEP_TOKEN_BOUNDS, num_tokens)] += 1
            self._num_step_tokens += num_tokens

    def _report(self, opened: _Open, found: messages.StepTokens) -> None:
        request, handle = opened.request, opened.handle
        outputs, beams = self._engine.outputs_of(request)
        assert isinstance(outputs, TokenOutputs), "an engine with text"
        new = outputs.take()
        if beams is not None:
            self._report_progress(opened, outputs, found)
            found.hypotheses[handle] = [
                messages.pack_hypothesis(hypothesis, outputs.params)
                for hypothesis in beams.search.results(outputs.params.n)
            ]
            return
        if not new:
            return  # it was aborted
        self._report_progress(opened, outputs, found)
        num_top = outputs.params.logprobs
        for token in new:
            place = len(found.handles)
            if token.logprobs is not None and num_top is not None:
                found.logprobs[place] = messages.pack_logprobs(token.logprobs, num_top)
            if token.finish is not None:
                found.ends[place] = token.finish
            found.handles.append(handle)
            found.seq_indices.append(token.seq_index)
            found.token_ids.append(token.token_id)

    def _report_progress(
        self, opened: _Open, outputs: TokenOutputs, found: messages.StepTokens
    ) -> None:
        request, handle = opened.request, opened.handle
        num_preemptions = sum(seq.num_preemptions for seq in request.sequences)
        if opened.has_begun and num_preemptions == opened.num_preemptions:
            return
        if not opened.has_begun and outputs.prompt_logprobs is not None:
            num_top = outputs.params.prompt_logprobs
            assert num_top is not None, "only kept where they are wanted"
            found.prompt_logprobs[handle] = [
                messages.pack_logprobs(logprobs, num_top)
                for logprobs in outputs.prompt_logprobs[1:]
                if logprobs is not None
            ]
        opened.has_begun = True
        opened.num_preemptions = num_preemptions
        metrics = outputs.metrics
        found.progress.append(
            messages.Progress(
                handle,
                metrics.first_scheduled_time_s,
                metrics.first_token_time_s,
                request.sequences[0].num_cached_tokens,
                num_preemptions,
            )
        )


def _run(channel: Channel, start: messages.Start) -> int:
    try:
        from jpaged.engine import Engine

        engine = Engine(EngineConfig.from_options(**start.options), with_text=False)
    except _USERS_FAULTS as error:
        channel.send(messages.Failed(str(error) or type(error).__name__, is_users_fault=True))
        return 2
    try:
        _prepare_structured_outputs(engine)
        channel.send(messages.Ready(_info(engine), engine.tokenizer_source))
        EngineServer(engine, channel).serve()
    finally:
        engine.shutdown()
    return 0


def _prepare_structured_outputs(engine: "Engine") -> None:
    """Does now what would hold up the steps of all when the first grammar comes."""
    if engine.tokenizer is None or not structured_outputs.is_available():
        return  # A request that wants it is told why not.
    try:
        engine.prepare_structured_outputs()
    except ValueError as error:
        logger.warning("there is no structured output: %s", error)


def _info(engine: "Engine") -> EngineInfo:
    config = engine.config
    return EngineInfo(
        model=config.model or DEFAULT_MODEL,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.scheduler.config.max_num_seqs,
        vocab_size=engine.model_config.vocab_size,
        max_logprobs=config.max_logprobs,
        policy=config.policy,
        block_size=config.block_size,
        num_blocks=engine.runner.num_blocks,
        eos_token_ids=engine.eos_token_ids,
        default_sampling=engine.default_sampling,
    )


def end_with_parent() -> None:
    """Ends this process at once when its standard input is closed."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="jpaged-parent", daemon=True).start()


def main() -> int:
    """Serves the process that started this one; the exit code."""
    end_with_parent()
    # Who ends a server sends these to all of its processes; this one ends when it is told to.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(sys.argv[1])
    (start,) = channel.receive(wait=True)
    assert isinstance(start, messages.Start), f"the first message is {start}"
    channel.send(messages.Connected())
    with logging_to_stderr(start.log_level, start.log_format):
        try:
            return _run(channel, start)
        except BaseException as error:
            logger.exception("the engine has ended with an error")
            text = f"the engine has ended with an error: {error}"
            channel.send(messages.Failed(text, is_users_fault=False))
            return 1
        finally:
            channel.close()


if __name__ == "__main__":
    sys.exit(main())
