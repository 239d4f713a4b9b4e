"""From the prompt of a request to what the engine takes: token ids, made off the event loop."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jpaged.serving.errors import ApiError, bad_request
from jpaged.serving.protocol import GenerationBody
from jpaged.tokenizer import Tokenizer

T = TypeVar("T")

INLINE_CHARS = 1000
"""Texts up to this length take less time than handing them to a thread and back."""


class PromptReader:
    """Turns texts into tokens.

    Args:
        tokenizer: The model's, or None.
        max_model_len: Most tokens of a sequence.
        vocab_size: Token ids that the model knows.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, max_model_len: int, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.max_model_len = max_model_len
        # No text with more characters can fit, so that it need not be read to be refused.
        longest = (
            1 if tokenizer is None else max(map(len, tokenizer.backend.get_vocab()), default=1)
        )
        self.max_chars = longest * max_model_len

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ApiError: It has none.
        """
        if self._tokenizer is None:
            raise bad_request("this model has no tokenizer: only prompts of token ids", "prompt")
        return self._tokenizer

    async def encode(self, text: str, *, add_special_tokens: bool, field: str) -> list[int]:
        """The tokens of a text.

        Raises:
            ApiError: It is too long to fit.
            ValueError: It is no Unicode text.
        """
        tokenizer = self.tokenizer
        self.check_length(text, field)
        return await off_loop(len(text), lambda: tokenizer.encode(text, add_special_tokens))

    def check_length(self, text: str, field: str) -> None:
        """Refuses a text that cannot fit, whatever its tokens are."""
        if len(text) > self.max_chars:
            raise too_long(
                f"{field} must be at most max_model_len={self.max_model_len} tokens, got "
                f"{len(text)} characters, which are more",
                field,
            )

    def prompt(
        self,
        text: str | None,
        token_ids: Sequence[int],
        body: GenerationBody,
        *,
        max_tokens: int | None,
        field: str,
    ) -> Mapping[str, Any]:
        """A prompt as the engine takes it, cut to `truncate_prompt_tokens`.

        Raises:
            ApiError: It is empty, too long, or names tokens that do not exist.
        """
        token_ids = self._truncated(token_ids, body, max_tokens or 1)
        self._check(token_ids, field)
        prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
        if text is not None:
            prompt["prompt"] = text
        if body.cache_salt is not None:
            prompt["cache_salt"] = body.cache_salt
        return prompt

    def _check(self, token_ids: Sequence[int], field: str) -> None:
        if not token_ids:
            raise bad_request(f"{field} must have at least 1 token, got 0", field)
        if len(token_ids) >= self.max_model_len:
            raise too_long(
                f"{field} must have fewer than max_model_len={self.max_model_len} tokens, to leave "
                f"room for output, got {len(token_ids)}",
                field,
            )
        lowest, highest = min(token_ids), max(token_ids)
        if lowest < 0 or highest >= self._vocab_size:
            raise bad_request(
                f"{field} must hold token ids in [0, {self._vocab_size - 1}], got "
                f"{lowest if lowest < 0 else highest}",
                field,
            )

    def _truncated(
        self, token_ids: Sequence[int], body: GenerationBody, max_tokens: int
    ) -> Sequence[int]:
        limit = body.truncate_prompt_tokens
        if limit is None:
            if body.truncation_side is not None:
                raise bad_request("truncation_side needs truncate_prompt_tokens", "truncation_side")
            return token_ids
        if limit == -1:
            limit = max(self.max_model_len - max_tokens, 1)
        elif not 1 <= limit < self.max_model_len:
            raise bad_request(
                f"truncate_prompt_tokens must be -1 (what fits) or in [1, {self.max_model_len - 1}]"
                f", got {limit}",
                "truncate_prompt_tokens",
            )
        if body.truncation_side == "right":
            return token_ids[:limit]
        return token_ids[-limit:]


async def off_loop(num_chars: int, work: Callable[[], T]) -> T:
    """Does work that takes time by the character, in a thread if it is much."""
    return work() if num_chars <= INLINE_CHARS else await asyncio.to_thread(work)


def too_long(message: str, field: str) -> ApiError:
    """A prompt that does not fit, by the code that OpenAI's clients know."""
    return bad_request(message, field, "context_length_exceeded")
