"""The HTTP process's picture of a request that runs in the engine's: text, stops and outputs.

The same `RequestOutputs` as in an engine that makes text itself, over a `Request` that only its
tokens change.
"""

from typing import TYPE_CHECKING

from jpaged.beam_outputs import BeamOutputs
from jpaged.output_processor import RequestOutputs, TokenLogprobs
from jpaged.outputs import RequestOutput
from jpaged.request import Request, Sequence, SequenceStatus
from jpaged.sampling_params import SamplingParams
from jpaged.sequence_end import Finish
from jpaged.serving.messages import PackedHypothesis, PackedLogprobs, Progress
from jpaged.serving.messages import unpack_hypothesis as unpack
from jpaged.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jpaged.beam_search import Hypothesis


class Mirror:
    """One request as its tokens arrive."""

    def __init__(
        self, request: Request, params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self.request = request
        self.params = params
        self._hypotheses: list[Hypothesis] = []
        if request.is_beam_search:
            self._outputs = BeamOutputs(request, params, tokenizer, lambda n: self._hypotheses[:n])
        else:
            self._outputs = RequestOutputs(request, params, tokenizer)

    @property
    def is_finished(self) -> bool:
        """Whether all its sequences have ended."""
        return not self.request.unfinished

    def take_progress(self, progress: Progress) -> None:
        """Takes times and counters."""
        metrics = self._outputs.metrics
        metrics.first_scheduled_time_s = progress.first_scheduled_time_s
        metrics.first_token_time_s = progress.first_token_time_s
        first = self.request.sequences[0]
        first.num_cached_tokens = progress.num_cached_tokens
        first.num_preemptions = progress.num_preemptions  # those of all sequences together

    def take_prompt_logprobs(self, found: list[PackedLogprobs]) -> None:
        """Takes the log-probabilities of the prompt from its second token on."""
        for position, logprobs in enumerate(found, start=1):
            self._outputs.add_prompt_logprobs(position, logprobs)

    def take_token(
        self, seq_index: int, token_id: int, logprobs: TokenLogprobs | None, finish: Finish | None
    ) -> bool:
        """Takes a token, and why it ends its sequence; whether its text does, unlike the token.

        The engine is to be told then.
        """
        seq = self.request.sequences[seq_index]
        if seq.finish_reason is not None:
            return False  # it was sampled before the engine heard of the end
        seq.token_ids.append(token_id)
        found = self._outputs.sequences[seq_index].append(token_id, logprobs, finish)
        if found is None:
            return False
        _end(seq, found)
        return finish is None

    def take_hypotheses(self, found: list[PackedHypothesis]) -> None:
        """Takes what a beam search has found, which ends it."""
        self._hypotheses = [unpack(packed) for packed in found]
        for seq in list(self.request.unfinished):
            _end(seq, Finish("stop"))

    def abort(self) -> None:
        """Ends it with what is there."""
        for seq in list(self.request.unfinished):
            _end(seq, Finish("abort"))

    def output(self) -> RequestOutput | None:
        """What there is to tell since the last call, or None."""
        return self._outputs.output()


def _end(seq: Sequence, finish: Finish) -> None:
    seq.status = SequenceStatus.FINISHED
    seq.finish_reason, seq.stop_reason = finish.reason, finish.stop_reason
    seq.request.unfinished.remove(seq)
