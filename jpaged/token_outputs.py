"""What an engine without text keeps of a request: the tokens that nobody has taken yet.

For an engine in a process of its own. The text, and the stops that are found in it, are made where
the text is read: by `RequestOutputs`, which takes the same tokens there.
"""

import time
from typing import NamedTuple

from jpaged.output_processor import Finish, TokenLogprobs, token_finish
from jpaged.outputs import RequestMetrics
from jpaged.request import Request, Sequence
from jpaged.sampling_params import SamplingParams


class NewToken(NamedTuple):
    """A token of one sequence, and its log-probabilities if they are wanted."""

    seq_index: int
    token_id: int
    logprobs: TokenLogprobs | None


class TokenSequence:
    """One sequence: `logprobs` is None where none are wanted, as in `SequenceOutput`."""

    def __init__(self, sequence: Sequence, params: SamplingParams, new: list[NewToken]) -> None:
        self._sequence = sequence
        self._params = params
        self._new = new
        self.logprobs = None if params.logprobs is None else ()

    def append(
        self, token_id: int, logprobs: TokenLogprobs | None, max_length: int
    ) -> Finish | None:
        """Takes the token that was just appended to the sequence; says whether it ends there."""
        self._new.append(NewToken(self._sequence.seq_index, token_id, logprobs))
        finish = token_finish(self._sequence, self._params, token_id)
        if finish is None and len(self._sequence.token_ids) >= max_length:
            finish = Finish("length")
        return finish


class TokenOutputs:
    """Stands in for `RequestOutputs`.

    Attributes:
        metrics: Times of the request.
        prompt_logprobs: One entry a token of the prompt, if they are wanted.
    """

    def __init__(self, request: Request, params: SamplingParams) -> None:
        self.request = request
        self.params = params
        self.metrics = RequestMetrics(arrival_time_s=request.arrival_time)
        self._new: list[NewToken] = []
        self.sequences: list[TokenSequence] = []
        if not params.use_beam_search:
            self.sequences = [TokenSequence(seq, params, self._new) for seq in request.sequences]
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None for _ in request.prompt_token_ids]

    def note_token(self) -> None:
        """Takes the time of the first token."""
        if self.metrics.first_token_time_s is None:
            self.metrics.first_token_time_s = time.monotonic()

    def add_prompt_logprobs(self, position: int, logprobs: TokenLogprobs) -> None:
        """Takes the log-probabilities of the prompt token at `position`."""
        assert self.prompt_logprobs is not None
        self.prompt_logprobs[position] = logprobs

    def take(self) -> list[NewToken]:
        """The tokens since the last call, in the order in which they came."""
        new = self._new.copy()
        self._new.clear()
        return new

    def output(self) -> None:
        """Nothing: there is no text to tell."""
