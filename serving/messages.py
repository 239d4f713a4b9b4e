"""What the HTTP process and the engine process say to each other, as MessagePack over ZeroMQ.

A request is known by its `handle`, a number that the client never uses twice. All tokens of a step
travel in one `StepTokens`. Nothing here is pickled: what does not fit a type is not decoded.
"""

import dataclasses
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from jpaged.beam_search import BeamToken, Hypothesis
from jpaged.output_processor import TokenLogprobs
from jpaged.sampling_params import SamplingParams
from jpaged.sequence_end import Finish
from jpaged.serving.engine import EngineInfo

STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of the histogram of tokens in a step, in the engine's statistics."""


class _Message(msgspec.Struct, tag=True, array_like=True, gc=False):
    """A message: an array whose first entry is the name of the class."""


# To the engine.


class Start(_Message):
    """The first message: options of `EngineConfig.from_options`, and how to log."""

    options: dict[str, Any]
    log_level: str
    log_format: Literal["text", "json"]


class Add(_Message):
    """Queues a request; its prompt is checked already, its text stays where it is.

    `params` are the fields of `SamplingParams` that are not their defaults (`pack_params`).
    """

    handle: int
    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    priority: int
    cache_salt: str | None


class Abort(_Message):
    """Ends a request; nothing more need be said of it, unless it is a beam search."""

    handle: int


class EndSequence(_Message):
    """Ends one sequence: a stop string was found in its text."""

    handle: int
    seq_index: int


class Ask(_Message):
    """Asks for "stats" or "pool_view"; an `Answer` of the same `call` follows."""

    call: int
    what: str


class Stop(_Message):
    """Ends the engine."""


ToEngine = Start | Add | Abort | EndSequence | Ask | Stop

# From the engine.


class Connected(_Message):
    """Both sockets work; the model is about to be loaded."""


class Ready(_Message):
    """Requests may come."""

    info: EngineInfo
    tokenizer_source: str | None


class Failed(_Message):
    """The engine ends: the options are wrong (`is_users_fault`), or it has an error."""

    message: str
    is_users_fault: bool


class Rejected(_Message):
    """A request that cannot run, and why; the text is the user's."""

    handle: int
    message: str


class Answer(_Message):
    """What was asked for."""

    call: int
    value: dict[str, Any]


class PackedLogprobs(msgspec.Struct, array_like=True, gc=False):
    """`TokenLogprobs` of one position; the most likely tokens as bytes, i32 and f32."""

    logprob: float
    rank: int
    top_ids: bytes
    top_values: bytes

    @property
    def top_token_ids(self) -> NDArray[np.int32]:
        """The most likely tokens."""
        return np.frombuffer(self.top_ids, np.int32)

    @property
    def top_logprobs(self) -> NDArray[np.float32]:
        """Their log-probabilities."""
        return np.frombuffer(self.top_values, np.float32)


class PackedHypothesis(msgspec.Struct, array_like=True, gc=False):
    """A `Hypothesis`: its tokens, and their log-probabilities if they are wanted."""

    token_ids: list[int]
    logprobs: list[PackedLogprobs]
    cumulative_logprob: float
    score: float
    finish_reason: str | None


class Progress(msgspec.Struct, array_like=True, gc=False):
    """What changes rarely about a request: sent with its first token and after preemptions."""

    handle: int
    first_scheduled_time_s: float | None
    first_token_time_s: float | None
    num_cached_tokens: int
    num_preemptions: int


class StepTokens(_Message):
    """All that a step brought; the first three lists are parallel, one entry a token.

    Attributes:
        handles: Of the token's request.
        seq_indices: Of its sequence.
        token_ids: The token.
        logprobs: Place in those lists to log-probabilities, where they are wanted.
        ends: Place in those lists to why the sequence ends there, if it does.
        progress: Of the requests for which it has changed.
        prompt_logprobs: Handle to those of the prompt from its second token on; comes once, with
            the first token.
        hypotheses: Handle to the best ones of a beam search that has ended or was aborted.
    """

    handles: list[int]
    seq_indices: list[int]
    token_ids: list[int]
    logprobs: dict[int, PackedLogprobs]
    ends: dict[int, Finish]
    progress: list[Progress]
    prompt_logprobs: dict[int, list[PackedLogprobs]]
    hypotheses: dict[int, list[PackedHypothesis]]


FromEngine = Connected | Ready | Failed | Rejected | Answer | StepTokens

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
"""A message as bytes."""
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
"""Bytes as one of `ToEngine`."""
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
"""Bytes as one of `FromEngine`."""


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingParams)}


def pack_params(params: SamplingParams) -> dict[str, Any]:
    """The fields that are not their defaults; `SamplingParams(**fields)` is the same again."""
    values = {name: getattr(params, name) for name in _DEFAULTS}
    return {name: value for name, value in values.items() if value != _DEFAULTS[name]}


def pack_logprobs(logprobs: TokenLogprobs, num_top: int) -> PackedLogprobs:
    """Log-probabilities as a step reports them, of the `num_top` most likely tokens (-1: all)."""
    end = None if num_top == -1 else num_top
    return PackedLogprobs(
        logprobs.logprob,
        logprobs.rank,
        np.asarray(logprobs.top_token_ids[:end], np.int32).tobytes(),
        np.asarray(logprobs.top_logprobs[:end], np.float32).tobytes(),
    )


def pack_hypothesis(hypothesis: Hypothesis, params: SamplingParams) -> PackedHypothesis:
    """What beam search found; with all candidates, of which ranks are made, if they are wanted."""
    num_top = 0 if params.logprobs is None else -1
    return PackedHypothesis(
        hypothesis.token_ids,
        [pack_logprobs(token, num_top) for token in hypothesis.tokens],
        hypothesis.cumulative_logprob,
        hypothesis.score,
        hypothesis.finish_reason,
    )


def unpack_hypothesis(packed: PackedHypothesis) -> Hypothesis:
    """The same again."""
    tokens = [
        BeamToken(token_id, logprobs.logprob, logprobs.top_token_ids, logprobs.top_logprobs)
        for token_id, logprobs in zip(packed.token_ids, packed.logprobs, strict=True)
    ]
    return Hypothesis(tokens, packed.cumulative_logprob, packed.score, packed.finish_reason)
