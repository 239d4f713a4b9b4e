"""Tool calls in the text that models write: each format's parser, whole and streaming."""

from collections.abc import Callable

from jpaged.serving.tool_parsers.base import ParsedMessage as ParsedMessage
from jpaged.serving.tool_parsers.base import ToolCall as ToolCall
from jpaged.serving.tool_parsers.base import ToolDelta as ToolDelta
from jpaged.serving.tool_parsers.base import ToolParser as ToolParser
from jpaged.serving.tool_parsers.base import ToolStream as ToolStream
from jpaged.serving.tool_parsers.call_stream import CallParser, CallStream
from jpaged.serving.tool_parsers.call_stream import collect as collect
from jpaged.serving.tool_parsers.forced_call import forced_call as forced_call
from jpaged.serving.tool_parsers.hermes import HermesStream
from jpaged.serving.tool_parsers.llama3 import Llama3Stream
from jpaged.serving.tool_parsers.mistral import MistralStream

_STREAMS: dict[str, Callable[[], CallStream]] = {
    "hermes": HermesStream,
    "llama3_json": Llama3Stream,
    "mistral": MistralStream,
}
TOOL_PARSERS = tuple(_STREAMS)
"""Names that `get_tool_parser` knows."""
# Their markers are special tokens.
_WITH_SPECIAL_TOKENS = ("llama3_json", "mistral")


def get_tool_parser(name: str) -> ToolParser:
    """The parser of a format of calls.

    Raises:
        ValueError: There is none of that name.
    """
    return CallParser(_stream_of(name))


def needs_special_tokens(name: str) -> bool:
    """Whether answers are to be generated with `skip_special_tokens=False`, to keep the markers.

    Raises:
        ValueError: There is no parser of that name.
    """
    _stream_of(name)
    return name in _WITH_SPECIAL_TOKENS


def _stream_of(name: str) -> Callable[[], CallStream]:
    if name not in _STREAMS:
        raise ValueError(f"tool_call_parser must be one of {', '.join(_STREAMS)}, got {name!r}")
    return _STREAMS[name]
