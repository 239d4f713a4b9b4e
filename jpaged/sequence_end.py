"""Whether a token ends its sequence, whatever text it makes: the part of the engine's own process.

What follows from the text, a stop string, is found by `output_processor.SequenceOutput`.
"""

import dataclasses

from jpaged.request import Sequence
from jpaged.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class Finish:
    """Why a sequence ends: `finish_reason` and `stop_reason` of `CompletionOutput`."""

    reason: str
    stop_reason: int | str | None = None
    is_in_text: bool = True
    """Whether the token that ends it is part of the text."""


class SequenceEnd:
    """Looks at each token of one sequence."""

    def __init__(self, sequence: Sequence, params: SamplingParams) -> None:
        self._sequence = sequence
        self._params = params

    def check(self, token_id: int) -> Finish | None:
        """Whether the sequence ends with the token that was just appended to it."""
        params, sequence = self._params, self._sequence
        if sequence.num_output_tokens >= params.min_tokens:
            is_in_text = params.include_stop_str_in_output
            if not params.ignore_eos and token_id in sequence.request.eos_token_ids:
                return Finish("stop", None, is_in_text)
            if token_id in params.stop_token_ids:
                return Finish("stop", token_id, is_in_text)
        return Finish("length") if len(sequence.token_ids) >= sequence.max_length else None
