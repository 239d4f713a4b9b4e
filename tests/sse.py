"""A strict reader of server-sent events, as the specification and OpenAI's clients want them."""

import json
from typing import Any


def parse(body: bytes, *, comments: bool = False) -> list[dict[str, Any]]:
    """The JSON of all events of a stream that ends with [DONE]; asserts its form."""
    events, ends = parse_open(body, comments=comments)
    assert ends, "the stream ends with [DONE]"
    return events


def parse_open(body: bytes, *, comments: bool = False) -> tuple[list[dict[str, Any]], bool]:
    """The same of a stream that may have been cut; says whether it was complete."""
    assert body.endswith(b"\n\n"), body[-40:]
    found: list[dict[str, Any]] = []
    blocks = body.decode().removesuffix("\n\n").split("\n\n")
    for place, block in enumerate(blocks):
        assert "\n" not in block, "one line an event"
        assert "\r" not in block
        if block.startswith(":"):
            assert comments, block
            continue
        assert block.startswith("data: "), block
        data = block.removeprefix("data: ")
        if data == "[DONE]":
            assert place == len(blocks) - 1, "nothing comes after [DONE]"
            return found, True
        found.append(json.loads(data))
    return found, False
