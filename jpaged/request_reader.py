"""What a caller asks for becomes a checked `Request`. No JAX here: both processes of a server read.

The engine adds what only it knows: whether the pool can ever hold the request, and its sampling.
"""

import dataclasses
import time

from jpaged.prompts import Prompt, parse_prompt
from jpaged.request import Request
from jpaged.sampling_params import SamplingParams
from jpaged.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """What a model and its engine allow.

    Attributes:
        vocab_size: Token ids of the model.
        max_model_len: Most tokens of a sequence, prompt and output.
        max_num_seqs: Most sequences that run at once.
        max_logprobs: See `EngineConfig.max_logprobs`.
        eos_token_ids: The model's end-of-sequence tokens.
    """

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_logprobs: int
    eos_token_ids: tuple[int, ...]


class RequestReader:
    """Reads requests for one model."""

    def __init__(self, limits: RequestLimits, tokenizer: Tokenizer | None) -> None:
        self.limits = limits
        self.tokenizer = tokenizer

    def read(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int = 0
    ) -> Request:
        """A checked request that is not yet queued.

        Raises:
            ValueError: Prompt or parameters are out of range; names the field and the range.
        """
        if not isinstance(priority, int):
            raise ValueError(f"priority must be an integer, got {priority!r}")
        limits = self.limits
        parsed = parse_prompt(prompt, self.tokenizer, limits.vocab_size)
        token_ids = parsed.token_ids
        if len(token_ids) >= limits.max_model_len:
            raise ValueError(
                f"prompt must be at most {limits.max_model_len - 1} tokens so that one can follow "
                f"within max_model_len={limits.max_model_len}, got {len(token_ids)}"
            )
        params.validate(
            vocab_size=limits.vocab_size,
            max_logprobs=limits.max_logprobs,
            max_num_seqs=limits.max_num_seqs,
            eos_token_ids=limits.eos_token_ids,
        )
        for name in ("stop", "bad_words", "structured_outputs"):
            if getattr(params, name) and self.tokenizer is None:
                raise ValueError(f"{name} needs a tokenizer, and this model has none")
        return Request(
            request_id,
            token_ids,
            params,
            prompt=parsed.text,
            arrival_time=time.monotonic(),
            priority=priority,
            cache_salt=parsed.cache_salt,
            eos_token_ids=limits.eos_token_ids,
            skip_prefix_cache=params.prompt_logprobs is not None,
            num_seqs=params.num_seqs,
            is_beam_search=params.use_beam_search,
            awaits_tokens=params.structured_outputs is not None,
        )
