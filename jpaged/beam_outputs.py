"""One request's beam search between engine and scheduler: candidates in, outputs out.

Host only. A step brings the candidates of each beam; when those of all beams are there,
`BeamSearch` chooses and the sequences of the group are rearranged: who continues, who is dropped,
who forks. Until then the tokens that were sampled count as pending, and no beam is scheduled.
`BeamGroup` does that; `BeamOutputs` makes texts of what was found, maybe in another process.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from jpaged.beam_search import BeamSearch, Hypothesis
from jpaged.output_processor import RequestOutputs, TokenLogprobs, position_logprobs
from jpaged.outputs import CompletionOutput
from jpaged.request import Request, Sequence, SequenceStatus
from jpaged.tokenizer import IncrementalDetokenizer, Tokenizer

if TYPE_CHECKING:
    from jpaged.sampling_params import SamplingParams
    from jpaged.scheduler import Scheduler

_NOTHING_FOUND = Hypothesis([], 0.0, 0.0, None)


class BeamGroup:
    """The search of one request, and the sequences that are its beams.

    Attributes:
        search: what was found so far.

    Args:
        request: with as many sequences as the search has beams.
        params: of the request.
        max_tokens: most tokens of a beam.
        num_logprobs: most likely tokens that a step brings for each beam.
    """

    def __init__(
        self,
        request: Request,
        params: "SamplingParams",
        *,
        max_tokens: int,
        num_logprobs: int,
    ) -> None:
        self._request = request
        self.search = BeamSearch(
            beam_width=params.num_seqs,
            max_tokens=max_tokens,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            end_token_ids=params.end_token_ids(request.eos_token_ids),
        )
        self._num_logprobs = num_logprobs
        # The search's beams in its order; before the first choice all sequences are the same one.
        self._beams = request.sequences[:1]
        self._candidates: dict[Sequence, TokenLogprobs] = {}

    def take(self, seq: Sequence, candidates: TokenLogprobs) -> None:
        """Takes the candidates of one sequence; `settle` is to follow."""
        self._candidates[seq] = candidates

    def settle(self, scheduler: "Scheduler") -> bool:
        """Rearranges the group if all candidates are there; whether that ended the search.

        Those of a group that was preempted before it had all of them are given up: they are
        computed again with the others.
        """
        seqs = self._request.unfinished
        if len(self._candidates) < len(seqs):
            is_preempted = seqs[0].status is SequenceStatus.PREEMPTED
            if is_preempted and any(seq.num_pending == 0 for seq in seqs):
                for seq in self._candidates:
                    scheduler.drop_token(seq)
                self._candidates.clear()
            return False
        found = [self._candidates[seq] for seq in self._beams]
        count = self._num_logprobs
        chosen = self.search.advance(
            np.array([candidates.top_token_ids[:count] for candidates in found]),
            np.array([candidates.top_logprobs[:count] for candidates in found]),
        )
        self._candidates.clear()
        if self.search.is_done:
            for seq in list(seqs):
                scheduler.finish_sequence(seq, "stop")
            return True
        choices = [(self._beams[parent], token_id) for parent, token_id in chosen]
        self._beams = scheduler.advance_beams(self._request, choices)
        return False


class BeamOutputs(RequestOutputs):
    """What the caller sees of a request under beam search.

    Args:
        request: with as many sequences as the search has beams.
        params: of the request.
        tokenizer: of the model, if there is one.
        results: gives so many of the best hypotheses, best first, once the request has ended.
    """

    def __init__(
        self,
        request: Request,
        params: "SamplingParams",
        tokenizer: Tokenizer | None,
        results: Callable[[int], list[Hypothesis]],
    ) -> None:
        super().__init__(request, params, tokenizer)
        self._results = results

    def completions(self) -> list[CompletionOutput]:
        """The best hypotheses once the request has ended; nothing before."""
        if not self.request.is_finished:
            return []
        found = self._results(self.params.n)
        found += [_NOTHING_FOUND] * (self.params.n - len(found))  # aborted before the first token
        return [self._completion(index, hypothesis) for index, hypothesis in enumerate(found)]

    def _completion(self, index: int, hypothesis: Hypothesis) -> CompletionOutput:
        params, token_ids = self.params, hypothesis.token_ids
        stop_reason = None
        if hypothesis.finish_reason == "stop" and token_ids[-1] in params.stop_token_ids:
            is_eos = not params.ignore_eos and token_ids[-1] in self.request.eos_token_ids
            stop_reason = None if is_eos else token_ids[-1]
        logprobs = None
        if params.logprobs is not None:
            logprobs = [
                position_logprobs(token.token_id, token, params.logprobs, self._tokenizer)
                for token in hypothesis.tokens
            ]
        return CompletionOutput(
            index=index,
            text=self._text(hypothesis),
            token_ids=token_ids,
            cumulative_logprob=hypothesis.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=hypothesis.finish_reason or "abort",
            stop_reason=stop_reason,
            score=hypothesis.score,
        )

    def _text(self, hypothesis: Hypothesis) -> str:
        params = self.params
        if self._tokenizer is None or not params.detokenize:
            return ""
        detokenizer = IncrementalDetokenizer(
            self._tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            prompt_token_ids=self.request.prompt_token_ids,
        )
        token_ids = hypothesis.token_ids
        if hypothesis.finish_reason == "stop" and not params.include_stop_str_in_output:
            token_ids.pop()
        return detokenizer.append(token_ids) + detokenizer.finish()
