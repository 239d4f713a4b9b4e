"""Calls of Hermes and Qwen: `<tool_call>{"name": "f", "arguments": {…}}</tool_call>`, repeated."""

from jpaged.serving.tool_parsers.call_stream import CallStream

START = "<tool_call>"
END = "</tool_call>"


class HermesStream(CallStream):
    """Each call stands in tags of its own; without arguments it has none to give."""

    def __init__(self) -> None:
        super().__init__((START,), ("arguments",))

    def _after_marker(self) -> bool:
        self._begin_object()
        return True

    def _finish_object(self) -> None:
        name = self._object.name
        if name is not None and not self._object.has_arguments:
            self._tell_name(name)
            self._tell_arguments("{}")
            self._state = self._after_object
        else:
            super()._finish_object()

    def _after_object(self) -> bool:
        self._skip_spaces()
        is_end = self._starts_with(END)
        if is_end is None:
            return False
        if is_end:
            self._accept(len(END))
            self._end_calls()
        else:
            self._fail()
        return True
