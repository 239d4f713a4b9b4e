"""The offline Python API: prompts in, finished outputs in request order; or a stream of one."""

import collections
import dataclasses
import itertools
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from jpaged.compile_plan import CompilePlan
from jpaged.engine import Engine, EngineStats
from jpaged.engine_config import EngineConfig
from jpaged.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from jpaged.prompts import Prompt
from jpaged.request import Request
from jpaged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from jpaged.tokenizer import Tokenizer

Message = Mapping[str, Any]


class LLM:
    """A model that runs in this process.

    Args:
        model: See `EngineConfig.model`; None is the embedded default model.
        **options: Any other field of `EngineConfig`.

    Raises:
        ValueError: An option is unknown or out of range, or the model cannot be loaded.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self.engine = Engine(EngineConfig.from_options(model=model, **options))
        self._request_ids = itertools.count()
        # Outputs of open streams that another call's step has brought.
        self._inboxes: dict[str, collections.deque[RequestOutput]] = {}
        # Called after every step, by whoever wants to watch.
        self.on_step: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continuations of the prompts, in the order of the prompts.

        Args:
            prompts: One prompt or several: text, token ids, or a mapping with `prompt` or
                `prompt_token_ids`.
            sampling_params: One for all, or one a prompt; `get_default_sampling_params` if None.
            use_tqdm: Whether to show progress with tokens a second.
            priority: One a prompt, lower runs first; needs `policy="priority"`.

        Raises:
            ValueError: A prompt or a parameter is out of range. Nothing has run then.
        """
        many = _as_list(prompts)
        default = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params = _one_each("sampling_params", default, len(many))
        if priority is not None and self.engine.config.policy != "priority":
            raise ValueError('priority needs an engine with policy="priority"')
        priorities = _one_each("priority", 0 if priority is None else priority, len(many))
        requests = []
        for prompt, prompt_params, prompt_priority in zip(many, params, priorities, strict=True):
            prompt_params = dataclasses.replace(
                prompt_params, output_kind=RequestOutputKind.FINAL_ONLY
            )
            requests.append(self._make_request(prompt, prompt_params, prompt_priority))
        return self._run(requests, use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """The most likely continuations of each prompt, best first.

        The same as `generate` with `SamplingParams(use_beam_search=True)`, in the form of vLLM.

        Args:
            prompts: As in `generate`.
            params: For all prompts.
            use_tqdm: As in `generate`.

        Raises:
            ValueError: As `generate`.
        """
        outputs = self.generate(prompts, params.sampling_params(), use_tqdm=use_tqdm)
        return [self._beam_search_output(output, params) for output in outputs]

    def _beam_search_output(
        self, output: RequestOutput, params: BeamSearchParams
    ) -> BeamSearchOutput:
        sequences = []
        for completion in output.outputs:
            tokens = shown = output.prompt_token_ids + completion.token_ids
            if completion.finish_reason == "stop" and not params.include_stop_str_in_output:
                shown = tokens[:-1]
            assert completion.cumulative_logprob is not None, "beams always have one"
            assert completion.score is not None, "beams always have one"
            sequences.append(
                BeamSearchSequence(
                    tokens=tokens,
                    cum_logprob=completion.cumulative_logprob,
                    score=completion.score,
                    text=self.engine.tokenizer and self.engine.tokenizer.decode(shown, False),
                    finish_reason=completion.finish_reason,
                    stop_reason=completion.stop_reason,
                )
            )
        return BeamSearchOutput(sequences)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answers to one conversation or several, through the model's chat template.

        Args:
            messages: A conversation (mappings with `role` and `content`) or a list of them.
            sampling_params: As in `generate`.
            use_tqdm: As in `generate`.
            **template_options: Of `Tokenizer.apply_chat_template`: `chat_template`, `tools`,
                `add_generation_prompt`, `continue_final_message`.

        Raises:
            ValueError: As `generate`, or the messages do not fit the template.
        """
        if not messages:
            raise ValueError("messages must have at least 1 message, got 0")
        one = isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        prompts = [self.chat_prompt(c, **template_options) for c in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Sequence[Message], **template_options: Any) -> dict[str, Any]:
        """The prompt (text and token ids) that a conversation becomes."""
        tokenizer = self.get_tokenizer()
        text = tokenizer.apply_chat_template(messages, **template_options)
        # The template has written the special tokens itself.
        return {
            "prompt": text,
            "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False),
        }

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Outputs of one request as its tokens come; closing the iterator aborts the request."""
        params = sampling_params or self.get_default_sampling_params()
        return self._stream(self._make_request(prompt, params, 0))

    def _stream(self, request: Request) -> Iterator[RequestOutput]:
        request_id = request.request_id
        inbox = self._inboxes[request_id] = collections.deque()
        try:
            self.engine.add_request(request)
            finished = False
            while not finished:
                while not inbox:
                    self._step()
                output = inbox.popleft()
                finished = output.finished
                yield output
        finally:
            del self._inboxes[request_id]
            self.engine.abort_request(request_id)
            self._settle()

    def validate_request(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> None:
        """Raises what `generate` would raise for this request; runs nothing."""
        self._make_request(prompt, sampling_params or self.get_default_sampling_params(), 0)

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds where no parameters are given: what the model's generation config sets."""
        return SamplingParams(**self.engine.default_sampling)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ValueError: The model has none.
        """
        if self.engine.tokenizer is None:
            raise ValueError("this model has no tokenizer: prompts must be token ids")
        return self.engine.tokenizer

    def stats(self) -> EngineStats:
        """A snapshot of the engine's counters."""
        return self.engine.stats()

    @property
    def compile_plan(self) -> CompilePlan:
        """The step programs: which exist, and which are compiled."""
        return self.engine.runner.plan

    def shutdown(self) -> None:
        """Lets go of threads and device memory; the object is of no use afterwards."""
        self.engine.shutdown()

    def _make_request(self, prompt: Prompt, params: SamplingParams, priority: int) -> Request:
        request_id = str(next(self._request_ids))
        return self.engine.make_request(request_id, prompt, params, priority=priority)

    def _step(self) -> list[RequestOutput]:
        """One step of the engine; what belongs to an open stream also goes to its inbox."""
        assert self.engine.has_unfinished, "waiting for outputs that no step will bring"
        try:
            outputs = self.engine.step()
        except BaseException:
            try:
                for request_id in self._inboxes:
                    self.engine.abort_request(request_id)
            finally:
                self.engine.reset()
            raise
        if self.on_step is not None:
            self.on_step()
        for output in outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:
                inbox.append(output)
        return outputs

    def _settle(self) -> None:
        """Reads what is still in flight, unless other requests go on anyway."""
        while self.engine.has_unfinished and not self.engine.scheduler.has_unfinished():
            self._step()

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput | None] = {r.request_id: None for r in requests}
        num_left = len(requests)
        progress = _Progress(num_left) if use_tqdm else None
        try:
            for request in requests:
                self.engine.add_request(request)
            while num_left:
                for output in self._step():
                    if output.finished and output.request_id in finished:
                        finished[output.request_id] = output
                        num_left -= 1
                        if progress is not None:
                            progress.add(output)
        finally:
            for request in requests:
                self.engine.abort_request(request.request_id)
            self._settle()
            if progress is not None:
                progress.close()
        return [output for output in finished.values() if output is not None]


class _Progress:
    """A bar over requests that also tells tokens a second."""

    def __init__(self, num_requests: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=num_requests, desc="Processed prompts", dynamic_ncols=True)
        self._num_input = 0
        self._num_output = 0

    def add(self, output: RequestOutput) -> None:
        self._num_input += len(output.prompt_token_ids)
        self._num_output += sum(len(completion.token_ids) for completion in output.outputs)
        elapsed = self._bar.format_dict["elapsed"]
        if elapsed:
            self._bar.set_postfix_str(
                f"input {self._num_input / elapsed:.1f} tok/s, "
                f"output {self._num_output / elapsed:.1f} tok/s",
                refresh=False,
            )
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def _as_list(prompts: Any) -> list[Any]:
    """One prompt or several: a list of integers is one prompt."""
    if isinstance(prompts, (str, bytes, Mapping)):
        return [prompts]
    prompts = list(prompts)
    if prompts and all(isinstance(p, numbers.Integral) for p in prompts):
        return [prompts]
    if not prompts:
        raise ValueError("prompts must have at least 1 prompt, got 0")
    return prompts


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one for all or one a prompt ({count}), got {len(value)}")
    return list(value)
