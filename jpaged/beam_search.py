"""Beam search of one request, on the host: which beams go on, which are finished, when it is over.

Pure logic over log-probabilities: it knows neither blocks nor sequences. The meaning, float32
rounding included, is that of `transformers`' `generate(num_beams=..., do_sample=False)`: a finished
hypothesis scores its summed log-probability over its length, end token included, to the power of
`length_penalty`; only continuations among the `beam_width` best of a step may finish there.
"""

import dataclasses
import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from jpaged.sampling_params import EarlyStopping, num_candidates


@dataclasses.dataclass(frozen=True, slots=True)
class BeamToken:
    """Log-probabilities at one position of a hypothesis.

    Attributes:
        token_id: the token taken.
        logprob: its log-probability.
        top_token_ids: i32[num_candidates], the most likely tokens, best first.
        top_logprobs: f32[num_candidates], theirs.
    """

    token_id: int
    logprob: float
    top_token_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]

    @property
    def rank(self) -> int:
        """One more than the number of tokens strictly more likely."""
        return 1 + int((self.top_logprobs > self.logprob).sum())


@dataclasses.dataclass(frozen=True, slots=True)
class Hypothesis:
    """One continuation of the prompt.

    Attributes:
        tokens: its tokens in order, the end token included.
        cumulative_logprob: the sum of their log-probabilities.
        score: what hypotheses are ordered by, higher first.
        finish_reason: "stop" after an end token, "length" at `max_tokens`, None for a beam that
            was still going on.
    """

    tokens: list[BeamToken]
    cumulative_logprob: float
    score: float
    finish_reason: str | None

    @property
    def token_ids(self) -> list[int]:
        """The ids of its tokens, as a new list."""
        return [token.token_id for token in self.tokens]


class _Beam:
    """A beam after some token: the beam before it, and its last token (None for the prompt)."""

    __slots__ = ("logprob", "parent", "token")

    def __init__(
        self, parent: "_Beam | None", token: BeamToken | None, logprob: np.float32
    ) -> None:
        self.parent = parent
        self.token = token
        self.logprob = logprob

    def tokens(self) -> list[BeamToken]:
        found: list[BeamToken] = []
        beam: _Beam | None = self
        while beam is not None and beam.token is not None:
            found.append(beam.token)
            beam = beam.parent
        return found[::-1]


class BeamSearch:
    """The search of one request; `advance` is called once a step until `is_done`.

    Attributes:
        beam_width: beams that go on, and hypotheses kept, at most.
        num_tokens: tokens generated so far in each beam.
        is_done: whether nothing more can be found.

    Args:
        beam_width: at least 1.
        max_tokens: tokens after which every beam ends.
        length_penalty: exponent of the length in scores; above 0 favours long hypotheses.
        early_stopping: once `beam_width` hypotheses are finished, True ends the search; False goes
            on while the best beam, scored at its present length, is better than the worst of them;
            "never" the same, but scored at `max_tokens` where length is favoured.
        end_token_ids: tokens that finish a hypothesis.
    """

    def __init__(
        self,
        *,
        beam_width: int,
        max_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        end_token_ids: Collection[int] = (),
    ) -> None:
        self.beam_width = beam_width
        self.num_tokens = 0
        self.is_done = False
        self._max_tokens = max_tokens
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._end_token_ids = frozenset(end_token_ids)
        # Best first, as are the hypotheses.
        self._beams = [_Beam(None, None, np.float32(0.0))]
        self._finished: list[tuple[_Beam, np.float32, str]] = []

    @property
    def num_beams(self) -> int:
        """Beams that go on: one before the first call of `advance`."""
        return len(self._beams)

    @property
    def num_candidates(self) -> int:
        """Most likely tokens of each beam that `advance` needs, if the vocabulary has as many."""
        return num_candidates(self.beam_width, len(self._end_token_ids))

    def advance(
        self, token_ids: NDArray[np.int32], logprobs: NDArray[np.float32]
    ) -> list[tuple[int, int]]:
        """Chooses the next beams; they are (index of the beam continued, token), best first.

        They are the beams of the next call, in this order; empty once the search is done.

        Args:
            token_ids: i32[num_beams, C], the C >= `num_candidates` most likely tokens of each
                beam, best first.
            logprobs: f32[num_beams, C], their log-probabilities.
        """
        assert not self.is_done, "the search is over"
        assert len(token_ids) == len(logprobs) == self.num_beams, "one row a beam"
        self.num_tokens += 1
        num_columns = token_ids.shape[1]
        sums = np.array([beam.logprob for beam in self._beams])[:, None] + logprobs
        chosen: list[tuple[int, int]] = []
        beams: list[_Beam] = []
        finished = list(self._finished)
        for rank, place in enumerate(np.argsort(-sums, axis=None, kind="stable").tolist()):
            index, column = divmod(place, num_columns)
            token_id = int(token_ids[index, column])
            is_end = token_id in self._end_token_ids
            if is_end or self.num_tokens == self._max_tokens:
                if rank < self.beam_width:
                    beam = self._extended(index, column, token_ids, logprobs, sums)
                    score = self._score(beam.logprob, self.num_tokens)
                    finished.append((beam, score, "stop" if is_end else "length"))
            elif len(beams) < self.beam_width:
                beams.append(self._extended(index, column, token_ids, logprobs, sums))
                chosen.append((index, token_id))
            if rank + 1 >= self.beam_width and len(beams) == self.beam_width:
                break
        finished.sort(key=lambda entry: -entry[1])
        self._finished = finished[: self.beam_width]
        self._beams = beams
        self.is_done = not beams or self._is_settled()
        return [] if self.is_done else chosen

    def results(self, num: int) -> list[Hypothesis]:
        """The `num` best hypotheses, best first; before the search is done, beams among them."""
        found = list[tuple[_Beam, np.float32, str | None]](self._finished)
        if not self.is_done and self.num_tokens:
            found += [(b, self._score(b.logprob, self.num_tokens), None) for b in self._beams]
            found.sort(key=lambda entry: -entry[1])
        return [
            Hypothesis(beam.tokens(), float(beam.logprob), float(score), reason)
            for beam, score, reason in found[:num]
        ]

    def _extended(self, index: int, column: int, token_ids, logprobs, sums) -> _Beam:
        token = BeamToken(
            int(token_ids[index, column]),
            float(logprobs[index, column]),
            token_ids[index],
            logprobs[index],
        )
        return _Beam(self._beams[index], token, sums[index, column])

    def _score(self, logprob: np.float32, length: int) -> np.float32:
        return logprob / np.float32(math.pow(length, self._length_penalty))

    def _is_settled(self) -> bool:
        """Whether no beam can bring a hypothesis better than those that are finished."""
        if len(self._finished) < self.beam_width:
            return False
        if self._early_stopping is True:
            return True
        length = self.num_tokens
        if self._early_stopping == "never" and self._length_penalty > 0:
            length = self._max_tokens
        best_possible = self._score(self._beams[0].logprob, length)
        return not best_possible > self._finished[-1][1]
