"""What the streams of all formats share: text between calls, and calls that turn out to be none.

A stream is a state machine over characters: no decision depends on where a piece ends, so a whole
answer and its pieces give the same. A call is told as soon as its name is known and its arguments
have begun; from there on it stays a call. Should its JSON break later, its arguments end there and
the rest is text. What breaks before is text from its first character on.

Whitespace before a call is dropped, and so is whitespace behind the last one.
"""

from collections.abc import Callable, Collection, Iterable

from jpaged.serving.tool_parsers.base import ParsedMessage, ToolCall, ToolDelta
from jpaged.serving.tool_parsers.json_text import CallObject, Progress


class CallStream:
    """A reader of one answer; a format says what follows its markers.

    A state is a method that reads on in `_buffer` and returns False if it needs more text.

    Args:
        markers: What begins a call in the midst of text.
        argument_keys: What the arguments are called in a call's object.
    """

    def __init__(self, markers: Collection[str], argument_keys: Collection[str]) -> None:
        self._markers = markers
        self._argument_keys = argument_keys
        # What nothing was made of yet.
        self._buffer = ""
        # What was read of something that may become a call; its first part begins it.
        self._attempt: list[str] = []
        self._state = self._read_text
        self._object = CallObject(argument_keys)
        self._is_told = False
        self._num_calls = 0
        # Whitespace that is told with the text that follows it.
        self._spaces = ""
        self._is_behind_call = False
        self._deltas: list[ToolDelta] = []

    def push(self, text: str) -> list[ToolDelta]:
        """What can be told after this piece; nothing that may still become a call."""
        self._buffer += text
        while self._buffer and self._state():
            pass
        return self._take()

    def finish(self) -> list[ToolDelta]:
        """What was held back."""
        held = "".join(self._attempt) + self._buffer
        self._attempt, self._buffer = [], ""
        self._tell_text(held)
        if self._spaces and not self._is_behind_call:
            self._deltas.append(ToolDelta(content=self._spaces))
        self._spaces = ""
        return self._take()

    def _take(self) -> list[ToolDelta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    # What formats say.

    def _after_marker(self) -> bool:
        """State behind a marker: leads to `_begin_object`, or to `_fail`."""
        raise NotImplementedError

    def _after_object(self) -> bool:
        """State behind the object of a call: leads to the next one, or to `_end_calls`."""
        raise NotImplementedError

    # States.

    def _read_text(self) -> bool:
        """State between calls."""
        found = [(at, m) for m in self._markers if (at := self._buffer.find(m)) >= 0]
        if not found:
            num_held = max(_overlap(self._buffer, marker) for marker in self._markers)
            end = len(self._buffer) - num_held
            self._tell_text(self._buffer[:end])
            self._buffer = self._buffer[end:]
            return False
        at, marker = min(found)
        self._tell_text(self._buffer[:at])
        self._buffer = self._buffer[at:]
        self._begin_attempt(marker)
        return True

    def _read_object(self) -> bool:
        """State within the object of a call."""
        call = self._object
        self._accept(call.feed(self._buffer))
        if call.is_call:
            if not self._is_told:
                assert call.name is not None, "a call has a name"
                self._tell_name(call.name)
            self._tell_arguments(call.take_arguments())
        if call.progress is Progress.BROKEN:
            self._fail()
        elif call.progress is Progress.DONE:
            self._finish_object()
        return call.progress is not Progress.OPEN

    # Steps between states.

    def _begin_attempt(self, start: str) -> None:
        """Takes the beginning of what may be a call."""
        self._accept(len(start))
        self._is_told = False
        self._state = self._after_marker

    def _begin_object(self) -> None:
        """Goes on with an object that is to be a call."""
        self._is_told = False
        self._object = CallObject(self._argument_keys)
        self._state = self._read_object

    def _finish_object(self) -> None:
        """Goes on behind an object that is a call, or turned out to be none."""
        if self._object.is_call:
            self._state = self._after_object
        else:
            self._fail()

    def _fail(self) -> None:
        """Makes text of what was taken for a call, as far as it was not told as one."""
        held = "".join(self._attempt)
        self._attempt = []
        if not self._is_told and held:
            # A call may begin within it, but not where this one seemed to.
            start = next((m for m in self._markers if held.startswith(m)), held[0])
            self._tell_text(start)
            held = held[len(start) :]
        self._buffer = held + self._buffer
        self._state = self._read_text

    def _end_calls(self) -> None:
        """Goes on with text."""
        self._attempt = []
        self._state = self._read_text

    def _accept(self, count: int) -> None:
        """Takes characters that are part of a call if there is one."""
        if count:
            self._attempt.append(self._buffer[:count])
            self._buffer = self._buffer[count:]

    def _skip_spaces(self) -> None:
        self._accept(len(self._buffer) - len(self._buffer.lstrip()))

    def _starts_with(self, expected: str) -> bool | None:
        """Whether `expected` comes next; None if that cannot be said yet."""
        if self._buffer.startswith(expected):
            return True
        return None if expected.startswith(self._buffer) else False

    # What is told.

    def _tell_text(self, text: str) -> None:
        text = self._spaces + text
        stripped = text.rstrip()
        self._spaces = text[len(stripped) :]
        if stripped:
            self._is_behind_call = False
            self._deltas.append(ToolDelta(content=stripped))

    def _tell_name(self, name: str) -> None:
        self._is_told = True
        self._attempt = []
        self._spaces = ""
        self._is_behind_call = True
        self._deltas.append(ToolDelta(index=self._num_calls, name=name))
        self._num_calls += 1

    def _tell_arguments(self, text: str) -> None:
        self._attempt = []
        if text:
            self._deltas.append(ToolDelta(index=self._num_calls - 1, arguments=text))


def collect(deltas: Iterable[ToolDelta]) -> ParsedMessage:
    """The message that deltas add up to."""
    content: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        if delta.content is not None:
            content.append(delta.content)
        if delta.name is not None:
            names.append(delta.name)
            arguments.append([])
        if delta.arguments is not None:
            arguments[-1].append(delta.arguments)
    calls = [ToolCall(name, "".join(a)) for name, a in zip(names, arguments, strict=True)]
    return ParsedMessage("".join(content) or None, calls)


class CallParser:
    """One format of calls.

    Args:
        stream: Makes a reader of one answer.
    """

    def __init__(self, stream: Callable[[], CallStream]) -> None:
        self._stream = stream

    def parse(self, text: str) -> ParsedMessage:
        """The calls in a whole answer; a malformed call stays text."""
        stream = self._stream()
        return collect([*stream.push(text), *stream.finish()])

    def stream(self) -> CallStream:
        """A reader of one answer."""
        return self._stream()


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` may be the beginning of `marker`."""
    for count in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:count]):
            return count
    return 0
