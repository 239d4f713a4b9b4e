"""What is sent: a request, and prompts of a given length that are made up."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

_WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from
or had an they which one you were her all their there been has when who will more no if out
so said what up its about into than them can only other new some could time these two may
then do first any my now such like our over man me even most made after also did many before
must through back years where much your way well down should because each just those people
how too little state good very make world still own see men work long get here between both
life being under never day same another know while last might us great old year off come
since against go came right used take three
"""
"""So frequent that each, with the space before it, is one token of any English vocabulary."""

MIN_TOKEN_ID = 256
DEFAULT_VOCAB_SIZE = 30_000


@dataclasses.dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request of a benchmark.

    Attributes:
        prompt: Text, token ids, or the messages of a conversation.
        max_tokens: Tokens to ask for.
        prompt_tokens: How long the prompt is meant to be, if that is known; what the server counts
            goes before it.
        arrival_s: When a trace sent it, in seconds; None: nobody recorded it.
    """

    prompt: str | list[int] | list[dict[str, Any]]
    max_tokens: int
    prompt_tokens: int | None = None
    arrival_s: float | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a conversation."""
        return bool(self.prompt) and isinstance(self.prompt[0], dict)


class MadeUpPrompts:
    """Prompts without meaning, in pieces: equal keys give equal pieces, and so shared prefixes.

    Args:
        seed: Other seeds give other prompts.
        as_token_ids: Token ids instead of frequent English words, each of which is one token.
        vocab_size: Ids are drawn below it, and above the special tokens and bytes at the beginning
            of most vocabularies if there is room.
    """

    def __init__(
        self, seed: int, *, as_token_ids: bool = False, vocab_size: int = DEFAULT_VOCAB_SIZE
    ) -> None:
        if vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
        self._seed = seed
        self._as_token_ids = as_token_ids
        self._choices: Sequence[Any] = _WORDS.split()
        if as_token_ids:
            self._choices = range(min(MIN_TOKEN_ID, vocab_size // 2), vocab_size)

    def piece(self, key: object, num_tokens: int) -> list[Any]:
        """Words or ids of this many tokens, drawn from `key` and the seed alone."""
        return random.Random(f"{self._seed}:{key}").choices(self._choices, k=num_tokens)

    def prompt(self, pieces: Sequence[list[Any]]) -> str | list[int]:
        """The pieces one after another as a prompt."""
        joined = [token for piece in pieces for token in piece]
        return joined if self._as_token_ids else " ".join(joined)
