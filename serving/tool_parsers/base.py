"""What every parser of tool calls gives: calls from whole texts and from pieces of them."""

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """One call: the name of a function and its arguments as JSON text."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True, slots=True)
class ParsedMessage:
    """A whole answer: text outside of calls (None: there is none) and the calls in order."""

    content: str | None
    tool_calls: list[ToolCall]


@dataclasses.dataclass(frozen=True, slots=True)
class ToolDelta:
    """What is new: text (`content`), or a piece of call `index`; `name` comes once, first."""

    content: str | None = None
    index: int | None = None
    name: str | None = None
    arguments: str | None = None


class ToolStream(Protocol):
    """Takes an answer piece by piece."""

    def push(self, text: str) -> list[ToolDelta]:
        """What can be told after this piece; nothing that may still become a call."""
        ...

    def finish(self) -> list[ToolDelta]:
        """What was held back."""
        ...


class ToolParser(Protocol):
    """One format of calls; has no state of its own."""

    def parse(self, text: str) -> ParsedMessage:
        """The calls in a whole answer; a malformed call stays text."""
        ...

    def stream(self) -> ToolStream:
        """A reader of one answer."""
        ...
