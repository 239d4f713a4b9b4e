"""Grammars of structured output: compiled off the engine's thread, cached, and followed by tokens.

Owns all use of the package `llguidance`. What it is given may be hostile: a specification's size
(`StructuredOutputsParams`) and the package's limits bound the time and memory of a compilation and
of each mask; whatever goes wrong is one line that names the cause.
"""

import collections
import concurrent.futures
import importlib.util
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jpaged.structured_outputs_params import StructuredOutputsParams, lark_string

if TYPE_CHECKING:
    from jpaged.tokenizer import Tokenizer

MAX_CACHED_GRAMMARS = 256
MAX_CACHED_CHARS = 16 << 20
"""Of the specifications of cached grammars, all together."""

_EMPTY_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_COMMENT_LINES = re.compile(r"(?m)^[ \t]*#.*\n")
# Of address space: memory is taken only as deep as the stack grows. A level of references takes 13
# KB, and the longest JSON schema has room for 30,000.
_STACK_BYTES = 512 << 20
_stack_size_lock = threading.Lock()
MAX_COMPILATION_S = 10.0
# Compilations at once: more would take the engine's thread its processors.
_slots = threading.BoundedSemaphore(4)
_MAX_MESSAGE_CHARS = 400
# By default a token takes up to half a second where a grammar has ever more meanings for a text
# (`s: s s | "a"`, 269 tokens), and a lexer up to 100 MB; so some 30 ms and 20 MB. Objects of 200
# optional properties and unions of 600 objects still fit.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 1000,
    "step_max_items": 3000,
    "max_lexer_states": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
# The one limit that the matchers of a grammar share.
_SHARED_LIMIT = "too many states"
# A grammar that takes longer is not compiled again on the engine's thread.
_MAX_RENEWAL_S = 0.05


def is_available() -> bool:
    """Whether the package that structured outputs need is installed."""
    return importlib.util.find_spec("llguidance") is not None


def mask_width(vocab_size: int) -> int:
    """32-bit words of a mask of a vocabulary."""
    return -(-vocab_size // 32)


class Grammar:
    """A compiled specification; many sequences may follow it."""

    def __init__(self, tokenizer: Any, text: str, width: int) -> None:
        """Compiles llguidance's form of a grammar, for masks of that many words.

        Raises:
            ValueError: It is not valid, or beyond the limits.
        """
        self._tokenizer = tokenizer
        self._text = text
        self._width = width
        start = time.perf_counter()
        self._prototype = self._compile(MAX_COMPILATION_S)
        self._compile_s = time.perf_counter() - start
        if self._prototype.is_error():
            raise ValueError(_one_line(self._prototype.get_error()))

    def _compile(self, slot_wait_s: float) -> Any:
        import llguidance

        limits = llguidance.LLParserLimits(**_LIMITS)
        width = self._width

        def compile_it() -> Any:
            matcher = llguidance.LLMatcher(self._tokenizer, self._text, log_level=0, limits=limits)
            # What the first mask costs is paid here, and a limit that it meets is told now.
            _compute_mask(matcher, np.zeros(width, np.int32))
            return matcher

        return _run_apart(compile_it, slot_wait_s)

    def start(self) -> Any:
        """A matcher of the package that has seen no token."""
        return self._prototype.deep_copy()

    def renew(self, failed: Any, token_ids: Sequence[int]) -> Any:
        """What a matcher that failed goes on as: another one that has seen the same tokens.

        All matchers of a grammar share what was worked out of its lexer, and so its limit: it may
        be reached by what others made of it. Then it is compiled again, unless that takes long; a
        matcher that failed for itself stays what it is.
        """
        if _SHARED_LIMIT not in failed.get_error() or self._compile_s > _MAX_RENEWAL_S:
            return failed
        try:
            self._prototype = self._compile(slot_wait_s=0.0)
        except ValueError:
            return failed  # Others are being compiled, and the engine cannot wait for them.
        matcher = self.start()
        matcher.consume_tokens(list(token_ids))
        return matcher


class GrammarMatcher:
    """Where one sequence stands in its grammar.

    Args:
        grammar: Its grammar.
        end_token_ids: Tokens that end the output where it is complete, beside the model's.
    """

    def __init__(self, grammar: Grammar, end_token_ids: Iterable[int] = ()) -> None:
        self._grammar = grammar
        self._ends = np.array(list(end_token_ids), np.int32)
        self._matcher = grammar.start()
        self._token_ids: list[int] = []

    @property
    def backend(self) -> Any:
        """The package's own matcher."""
        return self._matcher

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further."""
        if not self._matcher.is_error():
            return None
        return f"structured_outputs: {_one_line(self._matcher.get_error())}"

    @property
    def is_complete(self) -> bool:
        """Whether the output is complete and nothing can follow it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def advance(self, token_id: int) -> None:
        """Takes the token that was sampled; `error` may say something afterwards."""
        if self._matcher.is_error():
            return
        self._token_ids.append(token_id)
        if not self._matcher.consume_token(token_id):
            self._matcher = self._grammar.renew(self._matcher, self._token_ids)

    def check_mask(self, mask: NDArray[np.int32]) -> None:
        """Completes a mask that was computed: tries again what failed, adds the end tokens."""
        if self._matcher.is_error():
            self._matcher = self._grammar.renew(self._matcher, self._token_ids)
            _compute_mask(self._matcher, mask)
        if len(self._ends) and self._matcher.is_accepting():
            words = mask.view(np.uint32)
            np.bitwise_or.at(words, self._ends >> 5, np.uint32(1) << (self._ends & 31).view("u4"))


class GrammarCompiler:
    """Compiles specifications for one vocabulary, and fills masks; safe to use from many threads.

    Args:
        tokenizer: The model's.
        vocab_size: Token ids that the model can produce; those beyond the tokenizer's are never
            allowed.
        eos_token_ids: The model's end-of-sequence tokens.
    """

    def __init__(
        self, tokenizer: "Tokenizer", vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._backend: Any = None
        self._executor: Any = None
        self._added_ids = set(tokenizer.backend.get_added_tokens_decoder())
        # In order of last use.
        self._cache: collections.OrderedDict[
            StructuredOutputsParams, concurrent.futures.Future[Grammar]
        ] = collections.OrderedDict()
        self._num_cached_chars = 0

    @property
    def num_cached(self) -> int:
        """Grammars in the cache."""
        return len(self._cache)

    def prepare(self) -> None:
        """Does at once what holds up every thread when the first specification is compiled.

        Raises:
            ValueError: As `compile`.
        """
        self._get_backend()

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar of a specification; takes up to seconds the first time.

        Raises:
            ValueError: The specification is not valid, asks for what is not supported or is beyond
                the limits; or `llguidance` is missing.
        """
        future: concurrent.futures.Future[Grammar] = concurrent.futures.Future()
        with self._lock:
            found = self._cache.setdefault(params, future)
            self._cache.move_to_end(params)
            if found is future:
                self._num_cached_chars += params.num_chars
                self._evict()
        if found is future:
            try:
                future.set_result(self._compile(params))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    if self._cache.get(params) is future:
                        self._drop(params)
        return found.result()

    def fill(self, matchers: Sequence[GrammarMatcher], masks: NDArray[np.int32]) -> None:
        """Writes the mask of each matcher, `int32[N, W]`; in parallel."""
        pairs = [(matcher.backend, i) for i, matcher in enumerate(matchers)]
        if len(pairs) == 1:
            _compute_mask(pairs[0][0], masks[0])
        else:
            self._executor.unsafe_compute_mask_ptr(
                pairs, masks.ctypes.data, masks.strides[0], len(masks)
            )
        # Where only one word of a mask is set, there may be only one token.
        for i in np.flatnonzero(np.count_nonzero(masks[: len(pairs)], axis=1) == 1).tolist():
            self._spell_out(matchers[i].backend, masks[i])
        for matcher, mask in zip(matchers, masks, strict=False):
            matcher.check_mask(mask)

    def _spell_out(self, matcher: Any, mask: NDArray[np.int32]) -> None:
        """Replaces a special token that the package wants for text that spells the same.

        Where only one text can follow, it takes the tokenizer's first token of it, even if that is
        a special one, which it then does not accept.
        """
        found = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if len(found) != 1 or int(found[0]) not in self._added_ids:
            return
        if matcher.is_stopped() or matcher.validate_tokens(found.tolist()) == 1:
            return
        text = matcher.compute_ff_bytes().decode("utf-8", "ignore")
        token_id = self._backend.greedy_tokenize(text)[0]
        mask[:] = 0
        mask.view(np.uint32)[token_id >> 5] = 1 << (token_id & 31)

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        tokenizer = self._get_backend()
        try:
            return Grammar(tokenizer, _grammar_text(params), mask_width(self._vocab_size))
        except ValueError as error:
            raise ValueError(
                f"structured_outputs.{params.form} cannot be used: {_one_line(str(error))}"
            ) from None
        except BaseException as error:
            # What a failed assertion of the package becomes is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"structured_outputs.{params.form} cannot be used: llguidance failed on it"
            ) from error

    def _get_backend(self) -> Any:
        """The tokenizer as the package sees it; made when it is first needed."""
        if not is_available():
            raise ValueError(
                'structured_outputs needs the package llguidance: pip install "jpaged[structured]"'
            )
        import llguidance

        with self._lock:
            if self._backend is None:
                if self._tokenizer.vocab_size > self._vocab_size:
                    raise ValueError(
                        "structured_outputs needs a tokenizer with at most as many tokens as the "
                        f"model ({self._vocab_size}), got {self._tokenizer.vocab_size}"
                    )
                try:
                    self._backend = llguidance.LLTokenizer(
                        self._tokenizer.backend.to_str(),
                        n_vocab=self._vocab_size,
                        eos_token=self._eos_token_ids or None,
                    )
                except ValueError as error:
                    raise ValueError(
                        "structured_outputs cannot be used with this model's tokenizer: "
                        f"{_one_line(str(error))}"
                    ) from error
                self._executor = llguidance.LLExecutor()
            return self._backend

    def _evict(self) -> None:
        while len(self._cache) > 1 and (
            len(self._cache) > MAX_CACHED_GRAMMARS or self._num_cached_chars > MAX_CACHED_CHARS
        ):
            self._drop(next(iter(self._cache)))

    def _drop(self, params: StructuredOutputsParams) -> None:
        del self._cache[params]
        self._num_cached_chars -= params.num_chars


def _run_apart(function: Callable[[], Any], slot_wait_s: float) -> Any:
    """What a function returns; it runs in a thread of its own with a large stack.

    The package follows rules and references by recursion, and a stack that overflows ends the
    process: one of 8 MB under a chain of 3,000. Nor do its limits bound everything: the
    intersection of many patterns takes it a time that doubles with each. Nothing can end such a
    compilation, but nobody waits for it any longer, and it keeps its slot.

    Raises:
        ValueError: It takes too long, or those before it do.
    """
    result: concurrent.futures.Future[Any] = concurrent.futures.Future()
    if not _slots.acquire(timeout=slot_wait_s):
        raise ValueError("too many others are being compiled; try again later")

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)
        finally:
            _slots.release()

    thread = threading.Thread(target=run, name="jpaged-grammar", daemon=True)
    with _stack_size_lock:
        size = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(size)
    try:
        return result.result(MAX_COMPILATION_S)
    except TimeoutError:
        raise ValueError(f"compiling it takes more than {MAX_COMPILATION_S:g} s") from None


def _compute_mask(matcher: Any, mask: NDArray[np.int32]) -> None:
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)


def _grammar_text(params: StructuredOutputsParams) -> str:
    """A specification in the package's own form."""
    from llguidance import LLMatcher

    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        # One terminal: as rules the grammar's items would be as many as the strings.
        strings = " | ".join(map(lark_string, params.choice))
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {strings}")
    if params.grammar is not None:
        return LLMatcher.grammar_from_lark(_lark_text(params.grammar))
    options: Any = {"lenient": False}
    if params.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    schema = '{"type": "object"}' if params.json_object else params.json
    assert isinstance(schema, str), "a schema is kept as text"
    if schema in ("true", "false"):  # which the package takes within another only
        schema = f'{{"allOf": [{schema}]}}'
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)


def _lark_text(grammar: str) -> str:
    """A grammar in Lark's syntax, given in that or as GBNF."""
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    # The package's test of syntax takes a time quadratic in the empty lines that follow each other.
    grammar = _EMPTY_LINES.sub("\n", grammar)
    if is_lark_syntax(grammar):
        return grammar
    try:
        return gbnf_to_lark(_COMMENT_LINES.sub("", grammar))
    except Exception as error:  # the converter raises bare Exception
        raise ValueError(str(error)) from error


def _one_line(text: str) -> str:
    text = " ".join(text.replace("<non-verbose/>", "").partition("<backtrace>")[0].split())
    return text if len(text) <= _MAX_MESSAGE_CHARS else text[:_MAX_MESSAGE_CHARS] + "…"
