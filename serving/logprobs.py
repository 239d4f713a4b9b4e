"""Log-probabilities of the engine in the forms of the API."""

from collections.abc import Sequence

from jpaged.outputs import Logprob, PositionLogprobs
from jpaged.serving.answers import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from jpaged.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    *,
    offset: int,
    as_token_ids: bool,
    tokenizer: Tokenizer | None,
) -> CompletionLogprobs:
    """Log-probabilities of /v1/completions.

    Args:
        token_ids: The tokens.
        positions: For each its log-probabilities; None for the first of a prompt.
        offset: Where the text of the first token begins.
        as_token_ids: Show tokens by their ids.
        tokenizer: Names the tokens that have no log-probability.
    """
    found = CompletionLogprobs([], [], [], [])
    for token_id, position in zip(token_ids, positions, strict=True):
        taken = None if position is None else position[token_id]
        if taken is None and tokenizer is not None and not as_token_ids:
            text = tokenizer.id_to_token(token_id)
        else:
            text = _token(token_id, taken, as_token_ids)
        found.text_offset.append(offset)
        found.tokens.append(text)
        offset += len(text)
        if position is None or taken is None:
            found.token_logprobs.append(None)
            found.top_logprobs.append(None)
            continue
        found.token_logprobs.append(_finite(taken.logprob))
        found.top_logprobs.append(
            {
                _token(i, entry, as_token_ids): _finite(entry.logprob)
                for i, entry in position.items()
            }
        )
    return found


def chat_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs],
    *,
    num_top: int,
    as_token_ids: bool,
) -> ChatLogprobs:
    """Log-probabilities of /v1/chat/completions: each token with the `num_top` most likely."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        top = sorted(position.items(), key=lambda item: item[1].rank)[:num_top]
        tops = [_top(i, entry, as_token_ids) for i, entry in top]
        taken = _top(token_id, position[token_id], as_token_ids)
        content.append(ChatLogprob(taken.token, taken.logprob, taken.bytes, tops))
    return ChatLogprobs(content)


def prompt_logprobs(positions: Sequence[PositionLogprobs | None]) -> PromptLogprobs:
    """Log-probabilities of a prompt as vLLM gives them: by position and token id."""
    return [None if position is None else _prompt_position(position) for position in positions]


def _prompt_position(position: PositionLogprobs) -> dict[str, PromptLogprob]:
    return {
        str(i): PromptLogprob(_finite(entry.logprob), entry.rank, entry.decoded_token)
        for i, entry in position.items()
    }


def _top(token_id: int, entry: Logprob, as_token_ids: bool) -> TopLogprob:
    text = _token(token_id, entry, as_token_ids)
    return TopLogprob(text, _finite(entry.logprob), list(text.encode(errors="replace")))


def _token(token_id: int, entry: Logprob | None, as_token_ids: bool) -> str:
    if as_token_ids or entry is None or entry.decoded_token is None:
        return f"token_id:{token_id}"
    return entry.decoded_token


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
