"""Readers of answers that can be nothing but calls, because a schema makes them so."""

import re

from jpaged.serving.tool_parsers import ToolDelta

_NAME = re.compile(r'"name"\s*:\s*"([^"]*)"')
_ARGUMENTS_DEPTH = 3  # the list, the call, the arguments


class NamedCallStream:
    """The whole answer is the arguments of one function.

    Args:
        name: Of the function.
    """

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def push(self, text: str) -> list[ToolDelta]:
        """The next piece of the arguments."""
        if not text:
            return []
        name, self._name = self._name, None
        return [ToolDelta(index=0, name=name, arguments=text)]

    def finish(self) -> list[ToolDelta]:
        """Nothing was held back."""
        return []


class CallListStream:
    """The answer is `[{"name":"f","arguments":{...}},...]`, without spaces between.

    The schema allows nothing else, so that brackets need not be checked, only counted.
    """

    def __init__(self) -> None:
        self._index = -1
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._head = ""

    def push(self, text: str) -> list[ToolDelta]:
        """Names once they are whole, and arguments piece by piece."""
        found: list[ToolDelta] = []
        arguments = ""
        for character in text:
            was_inside = self._depth >= _ARGUMENTS_DEPTH
            self._count(character)
            if was_inside or self._depth >= _ARGUMENTS_DEPTH:
                if not was_inside:
                    self._index += 1
                    name = _NAME.search(self._head)
                    found.append(ToolDelta(index=self._index, name=name[1] if name else ""))
                    self._head = ""
                arguments += character
                if self._depth < _ARGUMENTS_DEPTH:
                    found.append(ToolDelta(index=self._index, arguments=arguments))
                    arguments = ""
            else:
                self._head += character
        if arguments:
            found.append(ToolDelta(index=self._index, arguments=arguments))
        return found

    def finish(self) -> list[ToolDelta]:
        """Nothing that could be told was held back."""
        return []

    def _count(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\" and self._in_string:
            self._is_escaped = True
        elif character == '"':
            self._in_string = not self._in_string
        elif not self._in_string:
            self._depth += (character in "[{") - (character in "]}")
