"""What an engine without text keeps of a request: the tokens that nobody has taken yet.

For an engine in a process of its own. The text, and the stops that are found in it, are made where
the text is read: by `RequestOutputs`, which takes the same tokens there.
"""

import time
from typing import NamedTuple

from jpaged.output_processor import TokenLogprobs
from jpaged.outputs import RequestMetrics
from jpaged.request import Request, Sequence
from jpaged.sampling_params import SamplingParams
from jpaged.sequence_end import Finish


class NewToken(NamedTuple):
    """A token of one sequence, its log-probabilities if they are wanted, and whether it ends it."""

    seq_index: int
    token_id: int
    logprobs: TokenLogprobs | None
    finish: Finish | None


class TokenSequence:
    """One sequence: `logprobs` is None where none are wanted, as in `SequenceOutput`."""

    def __init__(self, sequence: Sequence, params: SamplingParams, new: list[NewToken]) -> None:
        self._seq_index = sequence.seq_index
        self._new = new
        self.logprobs = None if params.logprobs is None else ()

    def append(
        self, token_id: int, logprobs: TokenLogprobs | None, finish: Finish | None
    ) -> Finish | None:
        """Takes a token; see `SequenceOutput.append`."""
        self._new.append(NewToken(self._seq_index, token_id, logprobs, finish))
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
