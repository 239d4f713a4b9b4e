"""What a caller may give as a prompt, and what becomes of it: token ids."""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from jpaged.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any] | Sequence[int]
"""Text, token ids, or `{"prompt": ...}` / `{"prompt_token_ids": [...]}` with a `cache_salt`."""

_KNOWN_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


@dataclasses.dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """A prompt as token ids, with its text if it came as text."""

    token_ids: list[int]
    text: str | None
    cache_salt: str | None


def parse_prompt(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> ParsedPrompt:
    """The token ids of a prompt.

    Raises:
        ValueError: The prompt is empty, of no known form, or names tokens outside the vocabulary.
    """
    text: str | None = None
    token_ids: Any = None
    cache_salt: Any = None
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, Mapping):
        if unknown := set(prompt) - _KNOWN_KEYS:
            raise ValueError(
                f"prompt must have only the keys {sorted(_KNOWN_KEYS)}, got {sorted(unknown)}"
            )
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        cache_salt = prompt.get("cache_salt")
    else:
        token_ids = prompt
    if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
        raise ValueError(f"cache_salt must be a non-empty string, got {cache_salt!r}")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"prompt must be a string, got {type(text).__name__}")
    for name, value in (("prompt", text), ("cache_salt", cache_salt)):
        if value is not None and not _is_unicode(value):
            raise ValueError(f"{name} must be Unicode text, got a string with a lone surrogate")
    if token_ids is None:
        if text is None:
            raise ValueError("prompt must be text or have prompt or prompt_token_ids, got neither")
        if tokenizer is None:
            raise ValueError("prompt must be token ids: this model has no tokenizer")
        token_ids = tokenizer.encode(text)
    else:
        token_ids = _as_integers(token_ids)
    if not token_ids:
        raise ValueError("prompt must have at least 1 token, got 0")
    # The device would clip such an id and say nothing; a tokenizer may know more than the model.
    outside = next((i for i in token_ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise ValueError(f"prompt_token_ids must be in [0, {vocab_size - 1}], got {outside}")
    return ParsedPrompt(token_ids, text, cache_salt)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_integers(token_ids: Any) -> list[int]:
    given = type(token_ids).__name__
    if hasattr(token_ids, "tolist"):  # NumPy and JAX arrays
        token_ids = token_ids.tolist()
    if isinstance(token_ids, bytes) or not isinstance(token_ids, Sequence):
        raise ValueError(f"prompt_token_ids must be a list of integers, got {given}")
    for token_id in token_ids:
        if not isinstance(token_id, numbers.Integral) or isinstance(token_id, bool):
            raise ValueError(f"prompt_token_ids must be integers, got {token_id!r}")
    return [int(token_id) for token_id in token_ids]
