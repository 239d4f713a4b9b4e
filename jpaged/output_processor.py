"""From sampled token ids to what the caller sees: text, stops, log-probabilities, outputs.

Host only. Finds the stop strings in the text; whether a token ends its sequence by itself is told
by `sequence_end`. A token sampled after the one that ended a sequence (steps are read one late)
never reaches this module.
"""

import time
from typing import Any, Protocol

from jpaged.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from jpaged.request import Request, Sequence
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.sequence_end import Finish
from jpaged.tokenizer import IncrementalDetokenizer, Tokenizer


class TokenLogprobs(Protocol):
    """Log-probabilities of one position as the step reports them."""

    @property
    def logprob(self) -> float:
        """Of the token that was taken."""
        ...

    @property
    def rank(self) -> int:
        """Its rank, 1 for the most likely token."""
        ...

    @property
    def top_token_ids(self) -> Any:
        """The most likely tokens: a sequence or a NumPy array, as is `top_logprobs`."""
        ...

    @property
    def top_logprobs(self) -> Any:
        """Their log-probabilities."""
        ...


class SequenceOutput:
    """Text and log-probabilities of one sequence, and the test of whether it ends."""

    def __init__(
        self, sequence: Sequence, params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self.sequence = sequence
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
                prompt_token_ids=sequence.request.prompt_token_ids,
            )
        self.text = ""
        self.logprobs: list[PositionLogprobs] | None = None
        self.cumulative_logprob: float | None = None
        if params.logprobs is not None:
            self.logprobs = []
            self.cumulative_logprob = 0.0
        # A stop string may still be completed by what comes, so that many characters wait.
        longest = max((len(stop) for stop in params.stop), default=1)
        self._num_held_back = 0 if params.include_stop_str_in_output else longest - 1
        self._num_emitted_chars = 0
        self._num_emitted_tokens = 0

    def append(
        self, token_id: int, logprobs: TokenLogprobs | None, finish: Finish | None
    ) -> Finish | None:
        """Takes the token that was just appended to the sequence; says whether it ends there.

        Args:
            token_id: the token.
            logprobs: of its position, if they are wanted.
            finish: what `SequenceEnd` says of it; a stop string in the text comes before that.
        """
        params = self._params
        if self.logprobs is not None and logprobs is not None:
            assert self.cumulative_logprob is not None
            self.cumulative_logprob += logprobs.logprob
            assert params.logprobs is not None
            self.logprobs.append(
                position_logprobs(token_id, logprobs, params.logprobs, self._tokenizer)
            )
        is_end_token = finish is not None and finish.is_end_token
        # The token that stops is no part of the text, unless asked for.
        if self._detokenizer is not None and (
            not is_end_token or params.include_stop_str_in_output
        ):
            start = len(self.text)
            self.text += self._detokenizer.append([token_id])
            if not is_end_token and self.sequence.num_output_tokens >= params.min_tokens:
                found = self._check_stop_strings(start)
                if found is not None:
                    return found
        return None if finish is None else self._flush() or finish

    def _flush(self) -> Finish | None:
        """Takes what the detokenizer held back because it ends with half a character."""
        if self._detokenizer is None:
            return None
        start = len(self.text)
        self.text += self._detokenizer.finish()
        if self.sequence.num_output_tokens < self._params.min_tokens:
            return None
        return self._check_stop_strings(start)

    def _check_stop_strings(self, num_old_chars: int) -> Finish | None:
        """Cuts the text at the first stop string that ends in its new part."""
        found: tuple[int, str] | None = None
        for stop in self._params.stop:
            at = self.text.find(stop, max(num_old_chars - len(stop) + 1, 0))
            if at >= 0 and (found is None or at < found[0]):
                found = (at, stop)
        if found is None:
            return None
        at, stop = found
        self.text = self.text[: at + len(stop) * self._params.include_stop_str_in_output]
        return Finish("stop", stop)

    def output(self, kind: RequestOutputKind) -> CompletionOutput | None:
        """What there is to tell: everything so far, or under DELTA what is new (None: nothing)."""
        sequence = self.sequence
        if sequence.finish_reason == "abort":
            self._flush()
        end = len(self.text)
        if not sequence.is_finished:
            end = max(end - self._num_held_back, self._num_emitted_chars)
        first_char, first_token = 0, 0
        if kind is RequestOutputKind.DELTA:
            first_char, first_token = self._num_emitted_chars, self._num_emitted_tokens
            if sequence.num_output_tokens == first_token and not sequence.is_finished:
                return None
        self._num_emitted_chars = end
        self._num_emitted_tokens = sequence.num_output_tokens
        return CompletionOutput(
            index=sequence.seq_index,
            text=self.text[first_char:end],
            token_ids=sequence.token_ids[sequence.num_prompt_tokens + first_token :],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[first_token:],
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )


class RequestOutputs:
    """What the engine keeps of a request for its outputs; lives in `Request.engine_state`."""

    def __init__(
        self, request: Request, params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self.request = request
        self.params = params
        self._tokenizer = tokenizer
        self.metrics = RequestMetrics(arrival_time_s=request.arrival_time)
        self.sequences: list[SequenceOutput] = []
        if not params.use_beam_search:
            self.sequences = [SequenceOutput(seq, params, tokenizer) for seq in request.sequences]
        self._told_finished: set[int] = set()
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None for _ in request.prompt_token_ids]

    def note_token(self) -> None:
        """Takes the time of the first token."""
        if self.metrics.first_token_time_s is None:
            self.metrics.first_token_time_s = time.monotonic()

    def add_prompt_logprobs(self, position: int, logprobs: TokenLogprobs) -> None:
        """Takes the log-probabilities of the prompt token at `position`."""
        assert self.prompt_logprobs is not None
        assert self.params.prompt_logprobs is not None
        self.prompt_logprobs[position] = position_logprobs(
            self.request.prompt_token_ids[position],
            logprobs,
            self.params.prompt_logprobs,
            self._tokenizer,
        )

    def output(self) -> RequestOutput | None:
        """The request's output after a step, or None if there is nothing to tell."""
        request, kind = self.request, self.params.output_kind
        if request.is_finished:
            self.metrics.finished_time_s = time.monotonic()
        elif kind is RequestOutputKind.FINAL_ONLY:
            return None
        completions = self.completions()
        if not completions:
            return None
        self.metrics.num_preemptions = sum(s.num_preemptions for s in request.sequences)
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=completions,
            finished=request.is_finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=request.sequences[0].num_cached_tokens,
            metrics=self.metrics,
        )

    def completions(self) -> list[CompletionOutput]:
        """What there is to tell of each continuation."""
        kind = self.params.output_kind
        found = []
        for sequence in self.sequences:
            index = sequence.sequence.seq_index
            if kind is RequestOutputKind.DELTA and index in self._told_finished:
                continue
            completion = sequence.output(kind)
            if completion is not None:
                found.append(completion)
                if completion.finished:
                    self._told_finished.add(index)
        return found


def position_logprobs(
    token_id: int, logprobs: TokenLogprobs, num_top: int, tokenizer: Tokenizer | None
) -> PositionLogprobs:
    """The token taken and the `num_top` most likely ones (-1: all that were computed)."""

    def named(token_id: int, logprob: float, rank: int) -> Logprob:
        decoded = None if tokenizer is None else tokenizer.decode([token_id], False)
        return Logprob(logprob, rank, decoded)

    taken = {token_id: named(token_id, logprobs.logprob, logprobs.rank)}
    count = len(logprobs.top_token_ids) if num_top == -1 else num_top
    for i in range(count):
        top_id = int(logprobs.top_token_ids[i])
        taken.setdefault(top_id, named(top_id, float(logprobs.top_logprobs[i]), i + 1))
    return taken
