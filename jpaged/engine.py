"""The engine: requests in, steps, outputs out. Single-threaded; the callers give it threads.

Asynchronous by default: a step is scheduled and dispatched while the one before it still runs on
the device, so results are read one step late. What was sampled for a sequence after it ended is
discarded.
"""

import dataclasses
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from jpaged import platform
from jpaged.beam_outputs import BeamGroup, BeamOutputs
from jpaged.block_manager import BlockManager
from jpaged.config import SchedulerConfig
from jpaged.device_worker import DeviceWorker, load
from jpaged.engine_config import EngineConfig
from jpaged.generation_config import read_default_sampling
from jpaged.model_runner import ModelRunner, StepHandle, StepResult
from jpaged.models.loader import LoadedModel
from jpaged.multihost.leading_worker import LeadingWorker, lead
from jpaged.output_processor import RequestOutputs
from jpaged.outputs import RequestOutput
from jpaged.preemption import PreemptionPolicy
from jpaged.prompts import Prompt
from jpaged.request import Request, Sequence
from jpaged.request_reader import RequestLimits, RequestReader
from jpaged.sampling_params import SamplingParams
from jpaged.sampling_rows import RequestSampling
from jpaged.scheduler import Scheduler
from jpaged.scheduler_output import SchedulerOutput, SchedulerStats
from jpaged.sequence_end import SequenceEnd
from jpaged.structured_outputs import GrammarCompiler, GrammarMatcher
from jpaged.structured_outputs_params import StructuredOutputsParams
from jpaged.token_outputs import TokenOutputs
from jpaged.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from jpaged.multihost.leader import Leader

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters of an engine, for metrics and benchmarks."""

    scheduler: SchedulerStats
    num_blocks: int
    block_size: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_discarded_tokens: int
    num_compilations_after_warmup: int
    host_time_s: float
    """Seconds spent on scheduling and filling inputs, over all steps."""
    block_copy_s: float | None
    """Running average of what copying a block from the host takes; under
    `preemption_mode="auto"`, once one was."""
    prefill_token_s: float | None
    """Running average of what a token takes in a step with prompts; the same."""


@dataclasses.dataclass(slots=True)
class _EngineState:
    """What the engine keeps of a request."""

    outputs: RequestOutputs | TokenOutputs
    sampling: RequestSampling
    ends: list[SequenceEnd]
    beams: BeamGroup | None


class Engine:
    """Runs requests to their end, step by step.

    Args:
        config: What the user set.
        with_text: Whether it makes texts, and ends sequences where they have a stop string. Without
            it `advance` is to be called instead of `step`, and each request's `outputs_of` read.
    """

    def __init__(self, config: EngineConfig, *, with_text: bool = True) -> None:
        self.config = config
        self._with_text = with_text
        self._hosts: "Leader | None" = lead(config) if config.nnodes > 1 else None
        self.preemption = PreemptionPolicy(config.preemption_mode)
        self._is_timed = config.preemption_mode == "auto"
        try:
            loaded, scheduler_config, worker = self._open()
        except BaseException as error:
            if self._hosts is not None:
                self._hosts.close(error)
            raise
        self.model_config = loaded.config
        self.max_model_len = scheduler_config.max_model_len
        self.runner = ModelRunner(worker, config.block_size, scheduler_config.max_num_seqs)
        self.tokenizer: Tokenizer | None = None
        self.default_sampling = {}
        if config.generation_config == "auto":
            self.default_sampling = read_default_sampling(loaded.source)
        self.tokenizer_source: str | None = None
        if not config.skip_tokenizer_init:
            self.tokenizer_source = config.tokenizer or str(loaded.source)
            self.tokenizer = load_tokenizer(self.tokenizer_source)
        ends = () if self.tokenizer is None else self.tokenizer.eos_token_ids
        # A checkpoint may name the end of a turn in its tokenizer only.
        self.eos_token_ids = tuple(dict.fromkeys((*loaded.config.eos_token_ids, *ends)))
        limits = RequestLimits(
            vocab_size=loaded.config.vocab_size,
            max_model_len=scheduler_config.max_model_len,
            max_num_seqs=scheduler_config.max_num_seqs,
            max_logprobs=config.max_logprobs,
            eos_token_ids=self.eos_token_ids,
        )
        self._reader = RequestReader(limits, self.tokenizer)
        self._grammars: GrammarCompiler | None = None
        if self.tokenizer is not None:
            self._grammars = GrammarCompiler(
                self.tokenizer, loaded.config.vocab_size, self.eos_token_ids
            )
        self._start_scheduler(scheduler_config)
        self.num_step_tokens = 0
        """Tokens of the last step; 0 if there was nothing to run."""
        self._in_flight: deque[StepHandle] = deque()
        self._rng = np.random.default_rng(config.seed)
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_discarded_tokens = 0
        self._host_time_s = 0.0
        self._last_result_s = 0.0
        self._finished_early: list[Request] = []
        self._is_shut_down = False

    def _open(self) -> tuple[LoadedModel, SchedulerConfig, DeviceWorker]:
        """The model on its devices, and the budgets."""
        config = self.config
        loaded, budgets = load(config)
        on_copy_in = self.preemption.note_copies if self._is_timed else None
        if self._hosts is None:
            return loaded, budgets, DeviceWorker(loaded, config, budgets, on_copy_in=on_copy_in)
        worker = LeadingWorker(loaded, config, budgets, self._hosts, on_copy_in)
        return loaded, budgets, worker

    def _start_scheduler(self, scheduler_config: SchedulerConfig) -> None:
        cache = self.config.cache_config(self.runner.num_blocks, self.runner.num_host_blocks)
        self.block_manager = BlockManager(
            cache.num_blocks,
            cache.block_size,
            cache.enable_prefix_caching,
            num_host_blocks=cache.num_host_blocks,
            host_cache=cache.host_cache,
        )
        self.scheduler = Scheduler(scheduler_config, self.block_manager, self.preemption)

    # Requests.

    def make_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
    ) -> Request:
        """A checked request that is not yet queued.

        Raises:
            ValueError: Prompt or parameters are out of range; names the field and the range.
            RuntimeError: The engine was shut down.
        """
        if self._is_shut_down:
            raise RuntimeError("the engine was shut down and takes no more requests")
        request = self._reader.read(request_id, prompt, params, priority=priority)
        sampling = RequestSampling(
            params,
            vocab_size=self.model_config.vocab_size,
            eos_token_ids=self.eos_token_ids,
            encode=self._encode_bare if self.tokenizer is not None else None,
        )
        max_length = self.scheduler.check_request(request)
        beams = None
        if params.use_beam_search:
            beams = BeamGroup(
                request,
                params,
                max_tokens=max_length - len(request.prompt_token_ids),
                num_logprobs=sampling.num_logprobs,
            )
        outputs = self._make_outputs(request, params, beams)
        ends = self._make_ends(request, params)
        request.engine_state = _EngineState(outputs, sampling, ends, beams)
        return request

    def _make_outputs(
        self, request: Request, params: SamplingParams, beams: BeamGroup | None
    ) -> RequestOutputs | TokenOutputs:
        if not self._with_text:
            return TokenOutputs(request, params)
        if beams is not None:
            return BeamOutputs(request, params, self.tokenizer, beams.search.results)
        return RequestOutputs(request, params, self.tokenizer)

    def _make_ends(self, request: Request, params: SamplingParams) -> list[SequenceEnd]:
        if params.structured_outputs is None:
            return [SequenceEnd(seq, params) for seq in request.sequences]
        assert self._grammars is not None, "checked by the reader"
        assert isinstance(params.structured_outputs, StructuredOutputsParams), "normalised"
        grammar = self._grammars.compile(params.structured_outputs)
        return [
            SequenceEnd(seq, params, GrammarMatcher(grammar, params.stop_token_ids))
            for seq in request.sequences
        ]

    def prepare_structured_outputs(self) -> None:
        """Does now what the first request with structured output would have all others wait for.

        Raises:
            ValueError: Structured output does not work here; the text says why.
        """
        if self._grammars is None:
            raise ValueError("structured_outputs needs a tokenizer, and this model has none")
        self._grammars.prepare()

    def _encode_bare(self, text: str) -> list[int]:
        assert self.tokenizer is not None, "checked by the caller"
        return self.tokenizer.encode(text, add_special_tokens=False)

    def add_request(self, request: Request) -> None:
        """Queues a request made by `make_request`.

        Raises:
            ValueError: A request of this id is unfinished, or it can never fit.
        """
        self.scheduler.add_request(request)
        state = _state_of(request)
        if state.outputs.params.seed is None:
            # Drawn here, so that a request that was only checked does not shift the next one's.
            state.sampling.reseed(int(self._rng.integers(0, 2**63)))
        self._num_prompt_tokens += len(request.prompt_token_ids)

    def abort_request(self, request_id: str) -> bool:
        """Ends a request and frees its blocks at once; False if there is none of this id.

        Its last output, with finish reason "abort", comes with the next step.
        """
        request = self.scheduler.get_request(request_id)
        if request is None:
            return False
        self.scheduler.abort_request(request_id)
        self._finished_early.append(request)
        return True

    def end_sequence(self, request_id: str, seq_index: int) -> None:
        """Ends a sequence whose text has met a stop string; nothing if it has ended by itself."""
        request = self.scheduler.get_request(request_id)
        if request is not None:
            self.scheduler.finish_sequence(request.sequences[seq_index], "stop")

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do, or to say of a host that is gone."""
        if self._hosts is not None and self._hosts.is_lost:
            return True
        return bool(self.scheduler.has_unfinished() or self._in_flight or self._finished_early)

    def on_host_lost(self, wake: Callable[[], None]) -> None:
        """Has `wake` called, in some thread, when a host is gone; `step` then raises."""
        if self._hosts is not None:
            self._hosts.on_lost(wake)

    # Steps.

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step and returns what the one before it brought."""
        found = (_state_of(request).outputs.output() for request in self.advance())
        return [output for output in found if output is not None]

    def advance(self) -> list[Request]:
        """The same, but returns the requests that have something new to tell.

        Raises:
            RuntimeError: One of several hosts is gone; nothing can run any more.
        """
        if self._hosts is not None:
            self._hosts.check()
        touched, self._finished_early = self._finished_early, []
        if self._is_worth_waiting():
            touched += self._read(0)
        start = time.perf_counter()
        scheduled = self.scheduler.schedule()
        if scheduled.swap_outs or scheduled.swap_ins:
            self.runner.swap(scheduled)
        if scheduled.preempted:
            self._settle_beams({seq.request for seq in scheduled.preempted})
        self.num_step_tokens = scheduled.num_batched_tokens
        if not scheduled.is_empty:
            self._in_flight.append(self._dispatch(scheduled))
        self._host_time_s += time.perf_counter() - start
        touched += self._read(1 if self.config.async_scheduling and not scheduled.is_empty else 0)
        return list(dict.fromkeys(touched))

    def _is_worth_waiting(self) -> bool:
        """Whether most sequences could not be in the next step unless this one is read first.

        They then take part in every step instead of every other one; the rest loses what the host
        does between two steps.
        """
        if not self._in_flight or self._grammars is None or not self._grammars.num_cached:
            return False
        seqs = self._in_flight[-1].scheduled.seqs
        num_awaiting = sum(seq.request.awaits_tokens for seq in seqs)
        return 2 * num_awaiting > self.scheduler.num_running_seqs

    def _read(self, num_left: int) -> list[Request]:
        """Reads the oldest steps in flight, until so many are left."""
        touched: list[Request] = []
        while len(self._in_flight) > num_left:
            handle = self._in_flight.popleft()
            result = handle.result()
            if self._is_timed:
                self._note_time(handle)
            touched += self._process(handle.scheduled, result)
        return touched

    @staticmethod
    def outputs_of(request: Request) -> tuple[RequestOutputs | TokenOutputs, BeamGroup | None]:
        """What the engine keeps of a request of its own, and its beams if it has any."""
        state = _state_of(request)
        return state.outputs, state.beams

    def _note_time(self, handle: StepHandle) -> None:
        """Measures a step that has just ended, if it was one with prompts."""
        now, scheduled = time.perf_counter(), handle.scheduled
        if scheduled.num_batched_tokens > scheduled.num_decodes:
            # It began when it was dispatched or, if that was later, when the one before had ended.
            seconds = now - max(handle.dispatched_s, self._last_result_s)
            self.preemption.note_prefill(scheduled.num_batched_tokens, seconds)
        self._last_result_s = now

    def _dispatch(self, scheduled: SchedulerOutput) -> StepHandle:
        for seq in scheduled.admitted:
            state = _state_of(seq.request)
            metrics = state.outputs.metrics
            if metrics.first_scheduled_time_s is None:
                metrics.first_scheduled_time_s = time.monotonic()
            wants_prompt = state.outputs.prompt_logprobs is not None and seq.seq_index == 0
            self.runner.admit(seq, state.sampling, wants_prompt)
        self._set_masks([seq for seq in scheduled.admitted if seq.request.awaits_tokens])
        return self.runner.dispatch(scheduled)

    def _set_masks(self, seqs: list[Sequence]) -> None:
        """Sends the masks of what structured output allows next; of running sequences."""
        if not seqs:
            return
        assert self._grammars is not None, "structured output was admitted without it"
        found = [(seq.row, _matcher_of(seq)) for seq in seqs]
        rows = [row for row, _ in found if row is not None]
        matchers = [matcher for _, matcher in found]
        self.runner.set_masks(rows, functools.partial(self._grammars.fill, matchers))

    def _process(self, scheduled: SchedulerOutput, result: StepResult) -> list[Request]:
        touched: dict[Request, None] = {}
        searching: dict[Request, None] = {}
        masked: list[Sequence] = []
        first_token = 0
        for i, seq in enumerate(scheduled.seqs):
            state = _state_of(seq.request)
            outputs = state.outputs
            if outputs.prompt_logprobs is not None and seq.seq_index == 0:
                self._take_prompt_logprobs(scheduled, result, i, first_token)
            first_token += scheduled.num_scheduled_tokens[i]
            if not scheduled.samples[i]:
                continue
            if state.beams is not None:
                if seq.is_finished:
                    self._num_discarded_tokens += 1
                else:
                    state.beams.take(seq, result.logprobs(i))
                    outputs.note_token()
                    searching[seq.request] = None
                continue
            token_id = result.tokens[i]
            if not self.scheduler.append_token(seq, token_id):
                self._num_discarded_tokens += 1
                continue
            self._num_generated_tokens += 1
            outputs.note_token()
            sequence = outputs.sequences[seq.seq_index]
            logprobs = None if sequence.logprobs is None else result.logprobs(i)
            finish = state.ends[seq.seq_index].check(token_id)
            finish = sequence.append(token_id, logprobs, finish)
            if finish is not None:
                self.scheduler.finish_sequence(seq, finish.reason, finish.stop_reason)
            elif state.ends[seq.seq_index].matcher is not None and seq.row is not None:
                masked.append(seq)
            touched[seq.request] = None
        self._set_masks(masked)
        return [*touched, *self._settle_beams(searching)]

    def _settle_beams(self, requests: Iterable[Request]) -> list[Request]:
        """Lets the searches among some requests go on where they can; those that ended."""
        ended = []
        for request in requests:
            beams = _state_of(request).beams
            if beams is not None:
                num_tokens = beams.search.num_tokens
                if beams.settle(self.scheduler):
                    ended.append(request)
                advanced = beams.search.num_tokens - num_tokens
                self._num_generated_tokens += advanced * len(request.sequences)
        return ended

    def _take_prompt_logprobs(
        self, scheduled: SchedulerOutput, result: StepResult, index: int, first_token: int
    ) -> None:
        seq = scheduled.seqs[index]
        outputs = _state_of(seq.request).outputs
        assert outputs.prompt_logprobs is not None, "only called where they are wanted"
        start = scheduled.starts[index]
        end = min(start + scheduled.num_scheduled_tokens[index], seq.num_prompt_tokens - 1)
        for position in range(start, end):
            if outputs.prompt_logprobs[position + 1] is None:
                outputs.add_prompt_logprobs(
                    position + 1, result.prompt_logprobs(first_token + position - start)
                )

    # Everything else.

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        return EngineStats(
            scheduler=self.scheduler.stats(),
            num_blocks=self.runner.num_blocks,
            block_size=self.config.block_size,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_discarded_tokens=self._num_discarded_tokens,
            num_compilations_after_warmup=self.runner.plan.num_on_demand,
            host_time_s=self._host_time_s,
            block_copy_s=self.preemption.seconds_per_block,
            prefill_token_s=self.preemption.seconds_per_token,
        )

    def reset(self) -> None:
        """Makes the engine usable again after `step` has raised; abort all requests before.

        A step that was scheduled but not executed would leave blocks in the prefix cache that
        nothing has filled, so all that is cached is forgotten, and the scheduler's counters start
        again.
        """
        self._in_flight.clear()
        self.runner.reset()
        self._start_scheduler(self.scheduler.config)

    def shutdown(self) -> None:
        """Lets go of threads and device memory; unfinished requests are lost."""
        self._is_shut_down = True
        self._in_flight.clear()
        self.runner.shutdown()
        platform.return_freed_memory()


def _matcher_of(seq: Sequence) -> GrammarMatcher:
    matcher = _state_of(seq.request).ends[seq.seq_index].matcher
    assert matcher is not None, f"no structured output: {seq}"
    return matcher


def _state_of(request: Request) -> _EngineState:
    state = request.engine_state
    assert isinstance(state, _EngineState), f"{request} was not made by make_request"
    return state
