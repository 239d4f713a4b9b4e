"""Events come out of a stream however it is cut."""

import pytest

from jpaged.sse import EventParser

STREAM = ': hi\n\ndata: {"a": "ü"}\n\nevent: x\r\ndata:b\r\ndata: c\r\n\r\ndata: last'.encode()


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(STREAM)])
def test_events_do_not_depend_on_the_pieces(size):
    parser = EventParser()
    pieces = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
    events = [event for piece in pieces for event in parser.push(piece)]
    assert events == ['{"a": "ü"}', "b\nc"]
    assert parser.push(b"\n\n") == ["last"]


def test_bytes_that_are_no_text_are_replaced():
    assert EventParser().push(b"data: \xff\n\n") == ["\ufffd"]
