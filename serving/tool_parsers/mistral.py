"""Calls of Mistral: `[TOOL_CALLS] [{"name": "f", "arguments": {…}}, …]`, and the newer form.

That is `[TOOL_CALLS]f[ARGS]{…}`, repeated; `[CALL_ID]…` may stand before `[ARGS]` and is dropped,
and `[ARGS]` may be missing.
"""

import re

from jpaged.serving.tool_parsers.call_stream import CallStream
from jpaged.serving.tool_parsers.json_text import JSONScanner, Progress

START = "[TOOL_CALLS]"
ARGS = "[ARGS]"
CALL_ID = "[CALL_ID]"

_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_CALL_ID_LENGTH = 64


class MistralStream(CallStream):
    """Both forms are told apart by what follows the marker."""

    def __init__(self) -> None:
        super().__init__((START,), ("arguments",))
        self._name = ""
        self._arguments = JSONScanner()

    def _after_marker(self) -> bool:
        self._skip_spaces()
        if not self._buffer:
            return False
        if self._buffer[0] == "[":
            self._accept(1)
            self._begin_object()
            return True
        name = _NAME.match(self._buffer)
        if name is None:
            self._fail()
            return True
        if name.end() == len(self._buffer):
            return False
        self._name = name.group()
        self._accept(name.end())
        self._state = self._after_name
        return True

    # The list of objects.

    def _after_object(self) -> bool:
        self._skip_spaces()
        if not self._buffer:
            return False
        if self._buffer[0] == ",":
            self._accept(1)
            self._begin_object()
        elif self._buffer[0] == "]":
            self._accept(1)
            self._end_calls()
        else:
            self._fail()
        return True

    # A name and its arguments.

    def _after_name(self) -> bool:
        self._skip_spaces()
        if not self._buffer:
            return False
        for marker, state in ((CALL_ID, self._read_call_id), (ARGS, self._before_arguments)):
            found = self._starts_with(marker)
            if found is None:
                return False
            if found:
                self._accept(len(marker))
                self._state = state
                return True
        return self._before_arguments()

    def _read_call_id(self) -> bool:
        at = self._buffer.find(ARGS)
        if not 0 <= at <= _CALL_ID_LENGTH:
            if len(self._buffer) <= _CALL_ID_LENGTH + len(ARGS):
                return False
            self._fail()
            return True
        self._accept(at + len(ARGS))
        self._state = self._before_arguments
        return True

    def _before_arguments(self) -> bool:
        self._skip_spaces()
        if not self._buffer:
            return False
        if self._buffer[0] != "{":
            self._fail()
            return True
        self._tell_name(self._name)
        self._arguments = JSONScanner()
        self._state = self._read_arguments
        return True

    def _read_arguments(self) -> bool:
        scanner = self._arguments
        end = scanner.feed(self._buffer)
        self._tell_arguments(self._buffer[:end])
        self._buffer = self._buffer[end:]
        if scanner.progress is Progress.OPEN:
            return False
        self._end_calls()
        return True
