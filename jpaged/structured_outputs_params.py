"""What form a request's output must have: `StructuredOutputsParams`, checked on construction.

Whether a schema or grammar is valid is found out when it is compiled (`structured_outputs`).
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Self

MAX_CHARS = {"json": 1 << 18, "regex": 1 << 13, "choice": 1 << 20, "grammar": 1 << 16}
"""The longest specifications, in characters: they come from strangers, and within these a hostile
one takes seconds to compile."""

MAX_INTERSECTED = 16
"""Patterns that one value may have to match at once: the time doubles with each."""
MAX_MULTIPLE = 10_000
"""The largest `multipleOf`: the automaton has as many states."""

_FORMS = ("json", "regex", "choice", "grammar", "json_object")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form that the output must have; exactly one of the first five fields says which.

    Immutable, comparable and hashable: a schema is kept as JSON text, choices as a tuple.

    Attributes:
        json: a JSON schema, as text or as a mapping.
        regex: a regular expression that the whole output matches (Rust's syntax: no look-around,
            no back-references; its digits and letters are those of Unicode, not of ASCII).
        choice: strings, one of which the output is.
        grammar: a context-free grammar in Lark's syntax, or EBNF as llama.cpp writes it (GBNF).
        json_object: any JSON object.
        disable_any_whitespace: no whitespace in JSON that a value does not hold.
        whitespace_pattern: a regular expression for whitespace in JSON where it may stand.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        """Normalises every field and refuses what cannot be meant.

        Raises:
            ValueError: naming the field, what it may be and what it was.
        """
        for name in ("json_object", "disable_any_whitespace"):
            value = False if getattr(self, name) is None else getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
            self._set(name, value)
        given = self._given()
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs must have exactly one of {', '.join(_FORMS)}, got "
                f"{' and '.join(given) or 'none'}"
            )
        if self.json is not None:
            self._set("json", _schema_text(self.json))
        if self.choice is not None:
            self._set("choice", _checked_choice(self.choice))
        for name in ("regex", "grammar", "whitespace_pattern"):
            _check_text(name, getattr(self, name))
        if self.grammar is not None and (count := self.grammar.count("&")) > MAX_INTERSECTED:
            raise ValueError(f"grammar must have at most {MAX_INTERSECTED} '&', got {count}")
        self._check_whitespace(given[0])
        limit = MAX_CHARS.get(given[0])
        if limit is not None and self.num_chars > limit:
            raise ValueError(
                f"{given[0]} must have at most {limit} characters, got {self.num_chars}"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The same from a mapping, as requests bring it.

        Raises:
            ValueError: A field is unknown or out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(
                    f"structured_outputs must have fields among {', '.join(known)}, got {name!r}"
                )
        return cls(**fields)

    @property
    def form(self) -> str:
        """The name of the field that says the form."""
        return self._given()[0]

    @property
    def num_chars(self) -> int:
        """Characters of the specification."""
        texts = (self.json, self.regex, self.grammar, *(self.choice or ()))
        return sum(len(text) for text in texts if isinstance(text, str))

    def _given(self) -> list[str]:
        given = [name for name in _FORMS if getattr(self, name) not in (None, False)]
        # Unlike `json_object`, the schema `false` says something.
        return ["json", *given] if self.json is False else given

    def _check_whitespace(self, form: str) -> None:
        for name in ("disable_any_whitespace", "whitespace_pattern"):
            value = getattr(self, name)
            if value and form not in ("json", "json_object"):
                raise ValueError(f"{name} needs json or json_object, got {form}")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError(
                "whitespace_pattern must be None with disable_any_whitespace=True, got "
                f"{self.whitespace_pattern!r}"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def lark_string(text: str) -> str:
    """A text as Lark's grammars quote it."""
    # JSON's way, but for one character that JSON leaves as it is.
    return json.dumps(text).replace("\x7f", "\\u007f")


def _schema_text(schema: object) -> str:
    """A schema as JSON text, with its keys in the order given."""
    try:
        if isinstance(schema, str):
            if len(schema) > 4 * MAX_CHARS["json"]:  # before it is read; spaces do not count
                raise ValueError(f"it has {len(schema)} characters")
            schema = json.loads(schema)
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError("json must be a JSON schema, got one that is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"json must be a JSON schema: {error}") from None
    if not isinstance(schema, (Mapping, bool)):
        raise ValueError(f"json must be a JSON schema, an object or a boolean, got {text[:80]}")
    _check_text("json", text)
    _check_cost(schema)
    return text


def _check_cost(schema: object) -> None:
    """Refuses what takes a time and a memory without end to compile."""
    num_patterns, multiple, intersects = 0, 1, False
    left = [schema]
    while left:
        found = left.pop()
        if isinstance(found, (list, tuple)):
            left.extend(found)
        if not isinstance(found, Mapping):
            continue
        left.extend(found.values())
        patterns = [found.get("pattern"), *_keys(found.get("patternProperties"))]
        for pattern in patterns:
            if isinstance(pattern, str) and len(pattern) > MAX_CHARS["regex"]:
                raise ValueError(
                    f"json must have patterns of at most {MAX_CHARS['regex']} characters, got one "
                    f"of {len(pattern)}"
                )
        num_patterns += len(patterns) - 1 + ("pattern" in found) + ("format" in found)
        intersects |= "allOf" in found or ("$ref" in found and len(found) > 1)
        multiple *= _checked_multiple(found.get("multipleOf"))
    if intersects and multiple > MAX_MULTIPLE:
        raise ValueError(
            f"json must have multipleOf of a product of at most {MAX_MULTIPLE} where it has allOf, "
            "or $ref beside other keywords"
        )
    if intersects and num_patterns > MAX_INTERSECTED:
        raise ValueError(
            f"json must have at most {MAX_INTERSECTED} patterns and formats where it has allOf, or "
            f"$ref beside other keywords, got {num_patterns}"
        )


def _keys(value: object) -> Iterable[object]:
    return value if isinstance(value, Mapping) else ()


def _checked_multiple(value: object) -> int:
    """The digits of `multipleOf` as a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 1
    digits = int("".join(map(str, Decimal(str(value)).normalize().as_tuple().digits)))
    if digits > MAX_MULTIPLE:
        raise ValueError(
            f"json must have multipleOf of at most {MAX_MULTIPLE} (without decimal point and zeros)"
            f", got {value}"
        )
    return max(digits, 1)


def _checked_choice(choice: object) -> tuple[str, ...]:
    if isinstance(choice, str) or not isinstance(choice, Iterable):
        raise ValueError(f"choice must be a list of strings, got {choice!r}")
    strings = list(choice)
    if not strings:
        raise ValueError("choice must have at least 1 string, got 0")
    for string in strings:
        _check_text("choice", string)
    return tuple(dict.fromkeys(strings))


def _check_text(name: str, text: object) -> None:
    if text is None:
        return
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {text!r}")
    if not text:
        raise ValueError(f"{name} must not be empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} must be Unicode text, got a lone surrogate")
