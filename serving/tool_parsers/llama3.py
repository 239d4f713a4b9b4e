"""Calls of Llama 3: `{"name": "f", "parameters": {…}}`, by itself or behind `<|python_tag|>`.

Without the tag only an answer that begins with the object is a call. Several follow each other,
parted by `;` or by nothing.
"""

from jpaged.serving.tool_parsers.call_stream import CallStream

TAG = "<|python_tag|>"


class Llama3Stream(CallStream):
    """An object is a call only if it has a name and parameters (or arguments)."""

    def __init__(self) -> None:
        super().__init__((TAG,), ("parameters", "arguments"))
        self._state = self._read_start

    def _read_start(self) -> bool:
        """State before the first character that is no space."""
        spaces = len(self._buffer) - len(self._buffer.lstrip())
        self._tell_text(self._buffer[:spaces])
        self._buffer = self._buffer[spaces:]
        if not self._buffer:
            return False
        if self._buffer[0] == "{":
            self._begin_object()
        else:
            self._state = self._read_text
        return True

    def _after_marker(self) -> bool:
        self._begin_object()
        return True

    def _after_object(self) -> bool:
        """The next call, behind spaces and at most one semicolon."""
        self._skip_spaces()
        if not self._buffer:
            return False
        if self._buffer[0] == "{":
            self._begin_object()
        elif (has_tag := self._starts_with(TAG)) is None:
            return False
        elif has_tag:
            self._accept(len(TAG))
            self._begin_object()
        elif self._buffer[0] == ";" and ";" not in "".join(self._attempt):
            self._accept(1)
        else:
            self._leave()
        return True

    def _leave(self) -> None:
        """Goes on with text behind a call; a semicolon before it is part of it."""
        self._buffer = "".join(self._attempt) + self._buffer
        self._end_calls()
