"""The host side of sampling: a request's row of parameters, its logit bias and its bans.

A sequence's parameters are written once, at admission, into its row of an `int32[R, NUM_COLUMNS]`
array (`empty_rows`, `RequestSampling.row`) and gathered for each step; the sampler unpacks them on
the device. What changes from step to step (`min_tokens`, `bad_words` of several tokens) is given
for one step at a time by `RequestSampling.bans`. Host only: no JAX here.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from enum import IntEnum, auto

import numpy as np
from numpy.typing import NDArray

from jpaged.sampling_params import SamplingParams, num_candidates

MAX_BANS = 32
"""Tokens that may be banned for one row in one step."""

_NO_BANS: tuple[tuple[int, int], ...] = ()


class Column(IntEnum):
    """Columns of the row array; the floats and the seed are stored as their bits."""

    TEMPERATURE = 0
    TOP_P = auto()
    MIN_P = auto()
    PRESENCE_PENALTY = auto()
    FREQUENCY_PENALTY = auto()
    REPETITION_PENALTY = auto()
    TOP_K = auto()
    SEED_LOW = auto()
    SEED_HIGH = auto()
    SEQ_INDEX = auto()
    NUM_LOGPROBS = auto()
    HAS_BIAS = auto()
    HAS_MASK = auto()


NUM_COLUMNS = len(Column)


def pack_row(
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    seq_index: int = 0,
    num_logprobs: int = -1,
    has_bias: bool = False,
    has_mask: bool = False,
) -> NDArray[np.int32]:
    """Returns one row, `int32[NUM_COLUMNS]`; the defaults are greedy sampling and nothing else.

    Of `seed` the low 64 bits count; `top_k` is 0 for all tokens and `num_logprobs` the number of
    most likely tokens to return, -1 for no logprobs at all.
    """
    floats = np.array(
        [temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty],
        np.float32,
    )
    words = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32)
    integers = np.array([seq_index, num_logprobs, has_bias, has_mask], np.int32)
    return np.concatenate(
        [floats.view(np.int32), np.array([top_k], np.int32), words.view(np.int32), integers]
    )


def empty_rows(num_rows: int) -> NDArray[np.int32]:
    """Returns `int32[num_rows, NUM_COLUMNS]`, every row greedy: what padding rows should hold."""
    return np.tile(pack_row(), (num_rows, 1))


class RequestSampling:
    """What the sampler needs of one request, worked out once at admission.

    Attributes:
        needs_state: whether a sequence's row of the sampler's state (counts, prompt, bias) must
            be initialised when it is admitted or resumed.
        has_bias: whether the bias arrays say anything.
        bias_token_ids: `int32[E]`.
        bias_values: `float32[E]`, the value of each of those tokens in the bias row (-inf = ban).
        only_listed: whether every token not in `bias_token_ids` is banned.
        num_logprobs: most likely tokens to return with their log-probabilities, -1 for none and
            no log-probability of the sampled token either.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        seed: int = 0,
        eos_token_ids: Sequence[int] = (),
        encode: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        """Prepares rows, bias and bans.

        Args:
            params: validated against the model (`SamplingParams.validate`).
            vocab_size: number of token ids.
            seed: used where `params.seed` is None; its low 64 bits count.
            eos_token_ids: the model's end-of-sequence tokens.
            encode: text -> token ids without special tokens; needed for `bad_words`.

        Raises:
            ValueError: if no token would be left to sample, if `bad_words` cannot be tokenised,
                or if more than `MAX_BANS` tokens could be banned at once.
        """
        self._params = params
        self._min_tokens = params.min_tokens
        stop_ids = dict.fromkeys((*eos_token_ids, *params.stop_token_ids))
        self._stop_bans = [(token, -1) for token in stop_ids] if params.min_tokens else []
        words = _tokenised_bad_words(params.bad_words, vocab_size, encode)
        self._words = [word for word in words if len(word) > 1]
        self._check_num_bans()
        self._make_bias(vocab_size, {word[0] for word in words if len(word) == 1})
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        self.needs_state = self.has_bias or penalties != (0.0, 0.0, 1.0)
        self.num_logprobs = _num_logprobs(params, vocab_size, eos_token_ids)
        self._row = self._make_row(vocab_size, seed if params.seed is None else params.seed)

    @property
    def is_plain(self) -> bool:
        """Whether it wants the most likely token, or draws from all, and asks for nothing else."""
        params = self._params
        filters = self._row[Column.TOP_K] > 0 or params.min_p > 0.0 or params.top_p < 1.0
        asks_more = self.needs_state or self.may_ban or self.num_logprobs >= 0
        asks_more |= params.structured_outputs is not None
        return not asks_more and (params.is_greedy or not filters)

    @property
    def may_ban(self) -> bool:
        """Whether `bans` can ever return anything."""
        return bool(self._words or self._stop_bans)

    def reseed(self, seed: int) -> None:
        """Sets the seed of a request that brought none; the low 64 bits count."""
        words = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32)
        self._row[Column.SEED_LOW : Column.SEED_HIGH + 1] = words.view(np.int32)

    def row(self, seq_index: int) -> NDArray[np.int32]:
        """Returns the row of the request's sequence `seq_index`, `int32[NUM_COLUMNS]`."""
        row = self._row.copy()
        row[Column.SEQ_INDEX] = seq_index
        return row

    def bans(self, output_token_ids: Sequence[int], num_pending: int) -> Sequence[tuple[int, int]]:
        """Returns the tokens not allowed at the position that is sampled next.

        Each is a pair (token, if_last): banned if the token before it is `if_last`, or in any
        case if `if_last` is -1. At most `MAX_BANS` pairs.

        Args:
            output_token_ids: the sequence's output as far as the host knows it.
            num_pending: 1 if one more output token is sampled but not known here, else 0.
        """
        num_output = len(output_token_ids) + num_pending
        if not self._words:
            return self._stop_bans if num_output < self._min_tokens else _NO_BANS
        bans = list(self._stop_bans) if num_output < self._min_tokens else []
        for *prefix, last in self._words:
            if len(prefix) > num_output:
                continue
            known = len(prefix) - num_pending
            start = len(output_token_ids) - known
            if list(output_token_ids[start:]) == prefix[:known]:
                bans.append((last, prefix[-1] if num_pending else -1))
        return bans

    def _check_num_bans(self) -> None:
        # Two words are banned in one step only if what the host can compare of their prefixes
        # ends in the same token; of a two-token word it can compare nothing (num_pending = 1).
        ends = Counter(word[-3] for word in self._words if len(word) > 2)
        num_words = sum(len(word) == 2 for word in self._words)
        num_words += max(ends.values(), default=0)
        num_bans = len(self._stop_bans) + num_words
        if num_words and num_bans > MAX_BANS:
            raise ValueError(
                f"bad_words must ban at most {MAX_BANS} tokens at once, with the"
                f" {len(self._stop_bans)} stop tokens that min_tokens bans, got {num_bans}"
            )
        if num_bans > MAX_BANS:
            raise ValueError(
                f"stop_token_ids must be at most {MAX_BANS} with those of the model where"
                f" min_tokens is set, got {num_bans}"
            )

    def _make_bias(self, vocab_size: int, banned: set[int]) -> None:
        params = self._params
        bias = dict(params.logit_bias or {})
        if params.allowed_token_ids is not None:
            bias = {token: bias.get(token, 0.0) for token in params.allowed_token_ids}
            bias = {token: value for token, value in bias.items() if token not in banned}
            num_left = len(bias.keys() - {token for token, _ in self._stop_bans})
        else:
            bias.update(dict.fromkeys(banned, -np.inf))
            num_left = vocab_size - len(banned | {token for token, _ in self._stop_bans})
        if num_left <= 0:
            raise ValueError(
                "allowed_token_ids must leave a token that bad_words and min_tokens do not ban,"
                f" got {list(params.allowed_token_ids or ())[:8]}"
            )
        self.only_listed = params.allowed_token_ids is not None
        self.has_bias = self.only_listed or bool(bias)
        self.bias_token_ids = np.fromiter(bias.keys(), np.int32, len(bias))
        self.bias_values = np.fromiter(bias.values(), np.float32, len(bias))

    def _make_row(self, vocab_size: int, seed: int) -> NDArray[np.int32]:
        params = self._params
        sampled = not params.is_greedy
        return pack_row(
            # Within 1e-30 to 1e30 no float32 parameter is zero and no quotient of logits infinite.
            temperature=min(params.temperature, 1e30) if sampled else 0.0,
            top_p=max(params.top_p, 1e-30) if sampled else 1.0,
            min_p=params.min_p if sampled else 0.0,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=min(max(params.repetition_penalty, 1e-30), 1e30),
            top_k=params.top_k if sampled and 0 < params.top_k < vocab_size else 0,
            seed=seed,
            num_logprobs=self.num_logprobs,
            has_bias=self.has_bias,
            has_mask=params.structured_outputs is not None,
        )


def _num_logprobs(params: SamplingParams, vocab_size: int, eos_token_ids: Sequence[int]) -> int:
    asked = -1
    if params.logprobs is not None:
        asked = vocab_size if params.logprobs == -1 else params.logprobs
    if params.use_beam_search:
        num_ends = len(params.end_token_ids(eos_token_ids))
        asked = max(asked, num_candidates(params.num_seqs, num_ends))
    return asked


def _tokenised_bad_words(
    bad_words: Sequence[str], vocab_size: int, encode: Callable[[str], Sequence[int]] | None
) -> list[tuple[int, ...]]:
    """Returns the token sequences to ban, each word as it is spelled at a start and after a space.

    As vLLM: the form after a space counts only if it is as long and begins with another token.
    """
    if bad_words and encode is None:
        raise ValueError(f"bad_words needs a tokenizer, got bad_words={list(bad_words)!r}")
    words: dict[tuple[int, ...], None] = {}
    for text in bad_words:
        assert encode is not None, "checked above"
        bare = tuple(encode(text.lstrip()))
        spaced = tuple(encode(" " + text.lstrip()))
        if not bare:
            raise ValueError(f"bad_words must tokenise to at least one token, got {text!r}")
        words[bare] = None
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            words[spaced] = None
    for token in (token for word in words for token in word):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"bad_words must tokenise to token ids in [0, {vocab_size - 1}], got {token}"
            )
    return list(words)
