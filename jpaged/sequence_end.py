"""Whether a token ends its sequence, whatever text it makes: the part of the engine's own process.

What follows from the text, a stop string, is found by `output_processor.SequenceOutput`.
"""

import dataclasses

from jpaged.request import Sequence
from jpaged.sampling_params import SamplingParams
from jpaged.structured_outputs import GrammarMatcher


@dataclasses.dataclass(frozen=True, slots=True)
class Finish:
    """Why a sequence ends: `finish_reason` and `stop_reason` of `CompletionOutput`.

    `is_end_token` says whether the token itself stands for an end, and so is no part of the text
    unless that is asked for.
    """

    reason: str
    stop_reason: int | str | None = None
    is_end_token: bool = False


class SequenceEnd:
    """Looks at each token of one sequence; `matcher` follows its grammar if it has one."""

    def __init__(
        self, sequence: Sequence, params: SamplingParams, matcher: GrammarMatcher | None = None
    ) -> None:
        self.matcher = matcher
        self._sequence = sequence
        self._params = params

    def check(self, token_id: int) -> Finish | None:
        """Whether the sequence ends with the token that was just appended to it."""
        finish = self._check_end_token(token_id)
        if finish is None and self.matcher is not None:
            finish = self._check_grammar(self.matcher, token_id)
        if finish is None and len(self._sequence.token_ids) >= self._sequence.max_length:
            finish = Finish("length")
        return finish

    def _check_end_token(self, token_id: int) -> Finish | None:
        params, sequence, matcher = self._params, self._sequence, self.matcher
        if matcher is not None and matcher.error is not None:
            return Finish("abort", matcher.error, is_end_token=True)
        # Output that is complete has nothing but an end token left.
        if sequence.num_output_tokens >= params.min_tokens or matcher is not None:
            if not params.ignore_eos and token_id in sequence.request.eos_token_ids:
                return Finish("stop", is_end_token=True)
            if token_id in params.stop_token_ids:
                return Finish("stop", token_id, is_end_token=True)
        return None

    def _check_grammar(self, matcher: GrammarMatcher, token_id: int) -> Finish | None:
        """Follows the grammar; output that is complete ends, whatever its length."""
        matcher.advance(token_id)
        if matcher.error is not None:
            return Finish("abort", matcher.error)
        return Finish("stop") if matcher.is_complete else None
