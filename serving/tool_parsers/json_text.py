"""JSON that arrives piece by piece: where a value ends, and a call's name and arguments in it.

Strict JSON (RFC 8259), as `json.loads` takes it less its extensions. Nothing here depends on how a
text is cut into pieces.
"""

import json
import re
from collections.abc import Collection
from enum import Enum, auto

_SPACES = " \t\n\r"
_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]*')
_SPACE_RUN = re.compile(r"[ \t\n\r]*")
_WORD_RUN = re.compile(r"[-+.0-9A-Za-z]*")
_WORD = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")


class Progress(Enum):
    """How far a reader has come."""

    OPEN = auto()
    DONE = auto()
    BROKEN = auto()


class _Expect(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    WORD = auto()


class JSONScanner:
    """Finds the end of one JSON value, or the place where it breaks.

    Attributes:
        progress: DONE behind its last character; a number or a word is done only when another
            character follows.
    """

    def __init__(self) -> None:
        self.progress = Progress.OPEN
        self._expect = _Expect.VALUE
        # An open bracket for each level.
        self._stack: list[str] = []
        self._is_key = False
        self._word = ""
        self._num_hex = 0

    def feed(self, text: str, start: int = 0) -> int:
        """Reads on in `text`; the place behind the last character that belongs to the value."""
        at = start
        while at < len(text) and self.progress is Progress.OPEN:
            if self._expect is _Expect.STRING:
                at = self._read_string(text, at)
            elif self._expect is _Expect.WORD:
                at = self._read_word(text, at)
            elif self._expect in (_Expect.ESCAPE, _Expect.HEX):
                at += self._read_escape(text[at])
            elif text[at] in _SPACES:
                at = _end_of(_SPACE_RUN, text, at)
            else:
                at += self._read_mark(text[at])
        return at

    def _read_string(self, text: str, at: int) -> int:
        at = _end_of(_STRING_RUN, text, at)
        if at == len(text):
            return at
        if text[at] == "\\":
            self._expect = _Expect.ESCAPE
        elif text[at] == '"':
            self._end_string()
        else:
            self.progress = Progress.BROKEN
            return at
        return at + 1

    def _end_string(self) -> None:
        if self._is_key:
            self._expect = _Expect.COLON
        else:
            self._end_value()

    def _read_escape(self, character: str) -> int:
        if self._expect is _Expect.HEX:
            if character not in "0123456789abcdefABCDEF":
                return self._break()
            self._num_hex -= 1
        elif character == "u":
            self._expect, self._num_hex = _Expect.HEX, 4
        elif character not in '"\\/bfnrt':
            return self._break()
        else:
            self._num_hex = 0
        if not self._num_hex:
            self._expect = _Expect.STRING
        return 1

    def _read_word(self, text: str, at: int) -> int:
        end = _end_of(_WORD_RUN, text, at)
        self._word += text[at:end]
        if end < len(text):
            if _WORD.fullmatch(self._word):
                self._end_value()
            else:
                self._break()
        return end

    def _read_mark(self, character: str) -> int:
        """Takes a character between values; how many it took."""
        expect = self._expect
        takes_value = expect in (_Expect.VALUE, _Expect.VALUE_OR_END)
        takes_end = expect in (_Expect.COMMA_OR_END, _Expect.VALUE_OR_END, _Expect.KEY_OR_END)
        if takes_end and self._stack and character == _CLOSING[self._stack[-1]]:
            self._stack.pop()
            self._end_value()
        elif expect is _Expect.COLON and character == ":":
            self._expect = _Expect.VALUE
        elif expect is _Expect.COMMA_OR_END and character == ",":
            self._expect = _Expect.KEY if self._stack[-1] == "{" else _Expect.VALUE
        elif expect in (_Expect.KEY, _Expect.KEY_OR_END) and character == '"':
            self._expect, self._is_key = _Expect.STRING, True
        elif takes_value and character == '"':
            self._expect, self._is_key = _Expect.STRING, False
        elif takes_value and character in _CLOSING:
            self._stack.append(character)
            self._expect = _Expect.KEY_OR_END if character == "{" else _Expect.VALUE_OR_END
        elif takes_value and _WORD_RUN.fullmatch(character):
            self._expect, self._word = _Expect.WORD, ""
            return 0
        else:
            return self._break()
        return 1

    def _end_value(self) -> None:
        if self._stack:
            self._expect = _Expect.COMMA_OR_END
        else:
            self.progress = Progress.DONE

    def _break(self) -> int:
        self.progress = Progress.BROKEN
        return 0


class CallObject:
    """Reads one object that is a call, `{"name": "f", "arguments": {…}}`, keys in any order.

    Other keys are passed over. An object whose name is no string (or empty, or no Unicode text) or
    whose arguments are no object is broken, as is one that has either twice.

    Attributes:
        progress: DONE behind its closing brace.
        name: of the function, once it was read.
        has_arguments: whether its arguments have begun.
    """

    def __init__(self, argument_keys: Collection[str]) -> None:
        self.progress = Progress.OPEN
        self.name: str | None = None
        self.has_arguments = False
        self._argument_keys = argument_keys
        self._arguments = ""
        self._expect = _Expect.VALUE
        # What is being read: a key, or the value of one.
        self._scanner = JSONScanner()
        self._key = ""
        self._text = ""

    @property
    def is_call(self) -> bool:
        """Whether so much was read that it cannot but be a call."""
        return self.name is not None and self.has_arguments

    def take_arguments(self) -> str:
        """The text of the arguments that came since this was last called."""
        arguments, self._arguments = self._arguments, ""
        return arguments

    def feed(self, text: str) -> int:
        """Reads on; how many characters belong to the object."""
        at = 0
        while at < len(text) and self.progress is Progress.OPEN:
            if self._expect is _Expect.STRING:
                at = self._read_key(text, at)
            elif self._expect is _Expect.WORD:
                at = self._read_value(text, at)
            elif text[at] in _SPACES:
                at = _end_of(_SPACE_RUN, text, at)
            else:
                at += self._read_mark(text[at])
        return at

    def _read_mark(self, character: str) -> int:
        expect = self._expect
        if expect is _Expect.VALUE and character == "{":
            self._expect = _Expect.KEY_OR_END
        elif expect is _Expect.COLON and character == ":":
            self._expect = _Expect.WORD
            self._scanner, self._text = JSONScanner(), ""
        elif expect is _Expect.COMMA_OR_END and character == ",":
            self._expect = _Expect.KEY
        elif expect in (_Expect.COMMA_OR_END, _Expect.KEY_OR_END) and character == "}":
            self.progress = Progress.DONE
        elif expect in (_Expect.KEY, _Expect.KEY_OR_END) and character == '"':
            self._expect = _Expect.STRING
            self._scanner, self._text = JSONScanner(), ""
            return 0
        else:
            self.progress = Progress.BROKEN
            return 0
        return 1

    def _read_key(self, text: str, at: int) -> int:
        end = self._scan(text, at)
        if self._scanner.progress is Progress.DONE:
            self._key = json.loads(self._text)
            self._expect = _Expect.COLON
        return end

    def _read_value(self, text: str, at: int) -> int:
        if not self._text:
            at = _end_of(_SPACE_RUN, text, at)
            if at == len(text) or not self._begin_value(text[at]):
                return at
        end = self._scan(text, at)
        if self._key in self._argument_keys:
            self._arguments += text[at:end]
        if self._scanner.progress is Progress.DONE:
            if self._key == "name":
                self._take_name(json.loads(self._text))
            self._expect = _Expect.COMMA_OR_END
        return end

    def _take_name(self, name: str) -> None:
        if name and not any("\ud800" <= character <= "\udfff" for character in name):
            self.name = name
        else:
            self.progress = Progress.BROKEN

    def _begin_value(self, character: str) -> bool:
        if self._key == "name":
            allowed = self.name is None and character == '"'
        elif self._key in self._argument_keys:
            allowed = not self.has_arguments and character == "{"
            self.has_arguments |= allowed
        else:
            return True
        if not allowed:
            self.progress = Progress.BROKEN
        return allowed

    def _scan(self, text: str, at: int) -> int:
        end = self._scanner.feed(text, at)
        # Only the text of keys and names is looked at again.
        if not self._text or self._key == "name" or self._expect is _Expect.STRING:
            self._text += text[at:end]
        if self._scanner.progress is Progress.BROKEN:
            self.progress = Progress.BROKEN
        return end


_CLOSING = {"{": "}", "[": "]"}


def _end_of(run: re.Pattern[str], text: str, at: int) -> int:
    match = run.match(text, at)
    assert match is not None, "a run may be empty"
    return match.end()
