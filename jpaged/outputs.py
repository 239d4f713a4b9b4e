"""What a caller gets back: the names and meanings of vLLM's classes of the same names."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token under the model's own distribution, before any sampling rule."""

    logprob: float
    rank: int
    """1 for the most likely token of the vocabulary."""
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""Token id to log-probability: the token taken and the most likely ones of one position."""


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One continuation of a request.

    `finish_reason` is "stop", "length" or "abort", None while it runs; `stop_reason` is the stop
    string or stop token id that ended it, None for the end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    score: float | None = None
    """What beam search orders by: `cumulative_logprob` over the length to a power."""

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclasses.dataclass(slots=True)
class RequestMetrics:
    """Times of a request, in seconds of `time.monotonic`."""

    arrival_time_s: float
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    finished_time_s: float | None = None
    num_preemptions: int = 0

    @property
    def time_to_first_token_s(self) -> float | None:
        """From arrival to the first token, or None before it."""
        if self.first_token_time_s is None:
            return None
        return self.first_token_time_s - self.arrival_time_s


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """State of a request: all of its continuations so far, or what is new since the last one."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None


@dataclasses.dataclass(slots=True)
class BeamSearchSequence:
    """One continuation found by `LLM.beam_search`.

    `tokens` and `text` are those of prompt and continuation. `tokens` end with the end token, if
    one was reached; `text` does so only with `include_stop_str_in_output`. Without a tokenizer
    there is no text. The others are as in `CompletionOutput`.
    """

    tokens: list[int]
    cum_logprob: float
    score: float
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass(slots=True)
class BeamSearchOutput:
    """The continuations of one prompt, best first."""

    sequences: list[BeamSearchSequence]
