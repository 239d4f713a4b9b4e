"""What a caller may ask of one request: `SamplingParams`, checked on construction.

Names, defaults and meanings are vLLM's. A field that is not here is not supported and Python
refuses it; nothing is accepted and ignored. What depends on the model (vocabulary, limits of the
engine) is checked by `SamplingParams.validate`. Host only: no JAX here.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Literal, TypeGuard

from jpaged.structured_outputs_params import StructuredOutputsParams

GREEDY_EPSILON = 1e-5
"""A temperature below this means greedy sampling."""

MAX_LOGIT_BIAS = 100.0
"""The largest absolute value of a logit bias (OpenAI's range)."""


EarlyStopping = bool | Literal["never"]
"""When a beam search ends; see `SamplingParams.early_stopping`."""


def num_candidates(beam_width: int, num_end_tokens: int) -> int:
    """How many most likely tokens of each beam suffice for a choice among all its tokens.

    At worst all beams that go on come from one, where all end tokens may be likelier.
    """
    return beam_width + num_end_tokens


class RequestOutputKind(StrEnum):
    """What each output of a streamed request carries."""

    CUMULATIVE = "cumulative"
    """Everything generated so far."""
    DELTA = "delta"
    """Only what is new since the last output."""
    FINAL_ONLY = "final_only"
    """One output, when the request has finished."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt; immutable, comparable and hashable.

    Sequence fields may be given as any iterable or None and are kept as tuples.

    Attributes:
        n: number of independent continuations; of beam search, how many of the best to return.
        presence_penalty: in [-2, 2]; subtracted from the logit of every token in the output.
        frequency_penalty: in [-2, 2]; idem, times the number of occurrences in the output.
        repetition_penalty: > 0; logits of tokens in prompt or output are divided (if positive)
            or multiplied (if negative) by it.
        temperature: >= 0; below 1e-5 the most likely token is taken, and `top_p`, `top_k`,
            `min_p` and `seed` have no effect.
        top_p: in (0, 1]; keep the most likely tokens that together reach this probability.
        top_k: keep this many most likely tokens; 0 or -1 keeps all.
        min_p: in [0, 1]; drop tokens less likely than this times the most likely one.
        seed: a 64-bit signed integer that fixes all random draws; None or -1 for a random one.
        stop: string or strings that end the text; not part of it unless
            `include_stop_str_in_output`.
        stop_token_ids: tokens that end the text.
        ignore_eos: go on after the model's end-of-sequence token.
        max_tokens: tokens to generate at most; None for as many as the model's length allows.
        min_tokens: no end-of-sequence or stop token before this many tokens are generated.
        logprobs: also return the log-probability of each token and of this many most likely
            ones; None for nothing, -1 for the whole vocabulary.
        prompt_logprobs: idem for the tokens of the prompt.
        detokenize: produce text; if False, outputs carry token ids only.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: put spaces around special tokens in the text.
        include_stop_str_in_output: keep the stop string in the text.
        output_kind: what streamed outputs carry.
        logit_bias: token id -> value in [-100, 100] added to its logit. A value outside is
            refused; to ban or force tokens use `bad_words` or `allowed_token_ids`.
        allowed_token_ids: if given, no other token is generated.
        bad_words: words that are never completed, at the start of a word or within one.
        use_beam_search: look for the most likely continuations with `transformers`' beam search
            instead of sampling. Needs temperature 0; there is one output, at the end.
        best_of: the beam width, at least `n` (its default); only of beam search.
        length_penalty: in [-5, 5]; beam search orders continuations by their log-probability over
            their length to this power, so that above 0 it favours long ones.
        early_stopping: of beam search, once `best_of` continuations are complete: True ends it;
            False goes on while the best beam, scored at its present length, beats the worst of
            them; "never" the same, but scored at the greatest length where length is favoured.
        structured_outputs: the form that the output must have; a mapping is taken for its fields.
            Output ends where it is complete, whatever `min_tokens` says. Where `allowed_token_ids`
            or `bad_words` would leave no token that the form allows, they give way. Does not work
            with `ignore_eos` or beam search.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    use_beam_search: bool = False
    best_of: int | None = None
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Normalises every field and refuses what no model could do.

        Raises:
            ValueError: naming the field, what it may be and what it was.
        """
        self._normalise_numbers()
        self._normalise_lists()
        for name in _BOOLEAN_FIELDS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        try:
            self._set("output_kind", RequestOutputKind(self.output_kind))
        except ValueError:
            kinds = ", ".join(RequestOutputKind)
            raise ValueError(
                f"output_kind must be one of {kinds}, got {self.output_kind!r}"
            ) from None
        self._check_structured_outputs()
        self._check_beam_search()
        if self.is_greedy and self.n > 1 and not self.use_beam_search:
            raise ValueError(
                f"n must be 1 with greedy sampling (temperature {self.temperature}), got {self.n}"
            )
        if self.stop and not self.detokenize:
            raise ValueError("stop needs detokenize=True, got detokenize=False")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken each time."""
        return self.temperature < GREEDY_EPSILON

    @property
    def num_seqs(self) -> int:
        """Sequences that run for one prompt: beams, or continuations."""
        return self.n if self.best_of is None else self.best_of

    def end_token_ids(self, eos_token_ids: Iterable[int]) -> tuple[int, ...]:
        """The tokens that end a continuation, given the model's end-of-sequence tokens."""
        ends = () if self.ignore_eos else eos_token_ids
        return tuple(dict.fromkeys((*ends, *self.stop_token_ids)))

    def validate(
        self,
        *,
        vocab_size: int,
        max_logprobs: int,
        max_num_seqs: int | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        """Checks the parameters against a model and an engine.

        Args:
            vocab_size: number of token ids the model can produce.
            max_logprobs: the engine's limit on `logprobs` and `prompt_logprobs`; -1 for the
                whole vocabulary, 0 where the engine computes none.
            max_num_seqs: the most sequences the engine runs at once.
            eos_token_ids: the model's end-of-sequence tokens.

        Raises:
            ValueError: naming the field, what it may be and what it was.
        """
        if max_num_seqs is not None and self.num_seqs > max_num_seqs:
            name = "n" if self.best_of is None else "best_of"
            raise ValueError(
                f"{name} must be at most max_num_seqs={max_num_seqs}, got {self.num_seqs}"
            )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{name} must hold token ids in [0, {vocab_size - 1}], got {token}"
                    )
        limit = vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            if asked is None:
                continue
            if limit == 0:
                raise ValueError(f"{name} must be None where max_logprobs=0, got {asked}")
            if (vocab_size if asked == -1 else asked) > limit:
                raise ValueError(
                    f"{name} must be at most max_logprobs={limit}, got {asked}"
                    + (f" (all {vocab_size} tokens)" if asked == -1 else "")
                )
        if self.use_beam_search:
            num_ends = len(self.end_token_ids(eos_token_ids))
            if num_candidates(self.num_seqs, num_ends) > limit:
                raise ValueError(
                    f"best_of (the beam width) must be at most {max(limit - num_ends, 0)}, which is"
                    f" max_logprobs={limit} less {num_ends} end tokens, got {self.num_seqs}"
                )

    def _normalise_numbers(self) -> None:
        self._integer("n", 1, rule="at least 1")
        self._number("presence_penalty", "in [-2, 2]", lambda x: -2 <= x <= 2)
        self._number("frequency_penalty", "in [-2, 2]", lambda x: -2 <= x <= 2)
        self._number("repetition_penalty", "a finite number > 0", lambda x: x > 0)
        self._number("temperature", "a finite number >= 0", lambda x: x >= 0)
        self._number("top_p", "in (0, 1]", lambda x: 0 < x <= 1)
        self._integer("top_k", -1, rule="0 or -1 (all tokens) or at least 1")
        self._number("min_p", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._integer("max_tokens", 1, rule="at least 1, or None", optional=True)
        self._integer("min_tokens", 0, rule="at least 0")
        self._integer("best_of", 1, rule="at least 1, or None", optional=True)
        self._number("length_penalty", "in [-5, 5]", lambda x: -5 <= x <= 5)
        for name in ("logprobs", "prompt_logprobs"):
            self._integer(name, -1, rule="at least 0, -1 (all tokens) or None", optional=True)
        rule = "in [-2**63, 2**63 - 1] or None"
        self._integer("seed", -(2**63), 2**63 - 1, rule=rule, optional=True)
        if self.seed == -1:
            self._set("seed", None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}"
            )

    def _check_structured_outputs(self) -> None:
        given = self.structured_outputs
        if given is None:
            return
        if isinstance(given, Mapping):
            self._set("structured_outputs", StructuredOutputsParams.from_dict(given))
        elif not isinstance(given, StructuredOutputsParams):
            raise ValueError(
                f"structured_outputs must be StructuredOutputsParams, a mapping or None, got "
                f"{given!r}"
            )
        for name in ("use_beam_search", "ignore_eos"):
            if getattr(self, name):
                raise ValueError(f"structured_outputs does not work with {name}=True")

    def _check_beam_search(self) -> None:
        """Refuses what beam search cannot do, and its fields without it."""
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(
                f'early_stopping must be True, False or "never", got {self.early_stopping!r}'
            )
        if not self.use_beam_search:
            for name, default in _BEAM_SEARCH_FIELDS.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} needs use_beam_search=True, got {getattr(self, name)!r}"
                    )
            return
        if not self.is_greedy:
            raise ValueError(
                f"temperature must be 0 with use_beam_search=True, got {self.temperature}"
            )
        if self.best_of is not None and self.n > self.best_of:
            raise ValueError(
                f"n must be at most best_of={self.best_of} (the beam width), got {self.n}"
            )
        if self.output_kind is RequestOutputKind.DELTA:
            raise ValueError(
                'output_kind must be "final_only" or "cumulative" with use_beam_search=True: beams '
                'may be dropped again, got "delta"'
            )
        for name in _NOT_WITH_BEAMS:
            if getattr(self, name) != _default(name):
                raise ValueError(
                    f"{name} does not work with use_beam_search=True, got {getattr(self, name)!r}"
                )

    def _normalise_lists(self) -> None:
        self._strings("stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        self._strings("bad_words", self.bad_words)
        if any(not word.strip() for word in self.bad_words):
            raise ValueError(f"bad_words must not hold blank strings, got {self.bad_words!r}")
        self._token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self._token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids must be None or not empty, got an empty list")
        if self.logit_bias is not None:
            self._set("logit_bias", _checked_bias(self.logit_bias))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _integer(
        self,
        name: str,
        low: int,
        high: int | None = None,
        *,
        rule: str,
        optional: bool = False,
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not _is_integer(value):
            raise ValueError(f"{name} must be an integer, {rule}, got {value!r}")
        if value < low or (high is not None and value > high):
            raise ValueError(f"{name} must be {rule}, got {value}")
        self._set(name, int(value))

    def _number(self, name: str, rule: str, allowed: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if not _is_number(value):
            raise ValueError(f"{name} must be a number, {rule}, got {value!r}")
        try:
            number = float(value)
        except OverflowError:  # an integer beyond all floats
            number = math.inf
        if not math.isfinite(number) or not allowed(number):
            raise ValueError(f"{name} must be {rule}, got {value}")
        self._set(name, number)

    def _strings(self, name: str, values: Iterable[object] | None) -> None:
        if isinstance(values, str) or not isinstance(values, Iterable | None):
            raise ValueError(f"{name} must be a list of strings, got {values!r}")
        strings: dict[str, None] = {}
        for value in values or ():
            if not isinstance(value, str):
                raise ValueError(f"{name} must hold strings only, got {value!r}")
            if not value:
                raise ValueError(f"{name} must not hold empty strings, got {[*strings, value]!r}")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"{name} must hold Unicode text, got {value!r}")
            strings[value] = None
        self._set(name, tuple(strings))

    def _token_ids(self, name: str, values: Iterable[object] | None) -> None:
        if isinstance(values, str) or not isinstance(values, Iterable | None):
            raise ValueError(f"{name} must be a list of token ids, got {values!r}")
        tokens: dict[int, None] = {}
        for value in values or ():
            if not _is_integer(value) or value < 0:
                raise ValueError(f"{name} must hold integers >= 0 only, got {value!r}")
            tokens[int(value)] = None
        self._set(name, tuple(tokens))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How `LLM.beam_search` continues a prompt; names and defaults are vLLM's.

    Scores are those of `transformers`: only generated tokens count as length.

    Attributes:
        beam_width: beams to follow, and continuations to return.
        max_tokens: tokens to generate at most.
        ignore_eos: go on after the model's end-of-sequence token.
        temperature: must be 0.
        length_penalty: see `SamplingParams`, as for the next two.
        early_stopping: see `SamplingParams`.
        include_stop_str_in_output: keep the end token in the text.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        """Refuses what no model could do.

        Raises:
            ValueError: naming the field, what it may be and what it was.
        """
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise ValueError(f"{name} must be an integer, at least 1, got {value!r}")
        self.sampling_params()

    def sampling_params(self) -> SamplingParams:
        """The same as parameters of one request."""
        return SamplingParams(
            n=self.beam_width,
            best_of=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            include_stop_str_in_output=self.include_stop_str_in_output,
            use_beam_search=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


_BOOLEAN_FIELDS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "use_beam_search",
)
_BEAM_SEARCH_FIELDS = {"best_of": None, "length_penalty": 1.0, "early_stopping": False}
# What changes log-probabilities, or ends a continuation by its text.
_NOT_WITH_BEAMS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "stop",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
)


def _default(name: str) -> object:
    return SamplingParams.__dataclass_fields__[name].default


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _checked_bias(bias: object) -> dict[int, float] | None:
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {bias!r}")
    rule = f"in [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]"
    for token, value in bias.items():
        if not _is_integer(token) or token < 0:
            raise ValueError(f"logit_bias must have integers >= 0 as token ids, got {token!r}")
        if not _is_number(value) or not -MAX_LOGIT_BIAS <= value <= MAX_LOGIT_BIAS:
            raise ValueError(
                f"logit_bias must have values {rule}, got {value!r} for token {token};"
                " use bad_words or allowed_token_ids to ban or force tokens"
            )
    return {int(token): float(value) for token, value in bias.items()} or None
