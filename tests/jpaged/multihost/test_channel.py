"""Messages arrive as they were sent, however the network cuts them, or not at all."""

import socket
import threading

import numpy as np
import pytest

from jpaged.multihost import channel


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@pytest.mark.parametrize(
    "args",
    [
        (),
        (1, True, "decode_4", None, [[1, 2], [3, 4]]),
        (np.arange(7, dtype=np.int32),),
        ("x", np.zeros((0, 3), np.int32), np.arange(6, dtype=np.float32).reshape(2, 3), 5),
        (np.arange(40, dtype=np.int32)[::2],),
    ],
)
def test_a_message_arrives_as_it_was_sent(args, ends):
    one, other = ends
    data = channel.encode("call", *args)
    one.sendall(data + data)
    for _ in range(2):
        call, found = channel.receive(other)
        assert call == "call"
        assert len(found) == len(args)
        for ours, theirs in zip(found, args, strict=True):
            if isinstance(theirs, np.ndarray):
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
                np.testing.assert_array_equal(ours, theirs)
            else:
                assert ours == theirs


def test_a_large_message_comes_in_pieces(ends):
    one, other = ends
    array = np.random.default_rng(0).integers(0, 1 << 30, 3_000_000).astype(np.int32)
    data = channel.encode("large", array)
    thread = threading.Thread(target=one.sendall, args=(data,))
    thread.start()
    call, (found,) = channel.receive(other)
    thread.join()
    assert call == "large"
    np.testing.assert_array_equal(found, array)


def test_a_message_may_come_byte_by_byte(ends):
    one, other = ends
    data = channel.encode("slow", np.arange(5, dtype=np.int32), "end")

    def dribble():
        for i in range(len(data)):
            one.sendall(data[i : i + 1])

    thread = threading.Thread(target=dribble)
    thread.start()
    call, (array, text) = channel.receive(other)
    thread.join()
    assert (call, array.tolist(), text) == ("slow", [0, 1, 2, 3, 4], "end")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_connection_that_ends_is_an_error(share, ends):
    one, other = ends
    data = channel.encode("call", np.arange(100, dtype=np.int32))
    one.sendall(data[: int(share * len(data))])
    one.close()
    with pytest.raises(ConnectionError, match="the connection was closed"):
        channel.receive(other)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\xff" * 64])
def test_what_is_no_message_is_refused(data, ends):
    one, other = ends
    one.sendall(data)
    with pytest.raises(ValueError, match=r"a message must have at most 1000 bytes, got \d+"):
        channel.receive(other, max_bytes=1000)


def test_other_numbers_than_ours_are_refused(ends):
    one, other = ends
    array = np.zeros(1, np.int32)
    one.sendall(channel.encode("x", array).replace(b"int32", b"int16"))
    with pytest.raises(ValueError, match="a message's arrays must be of"):
        channel.receive(other)
    with pytest.raises(AssertionError, match="no dtype of messages: float64"):
        channel.encode("x", np.zeros(1))


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\xff",
        b"7",
        b'["call"]',
        b'["call", 7]',
        b'["call", [{}]]',
        b'["call", [{"dtype": "int32"}]]',
        b'["call", [{"dtype": [], "shape": [1]}]]',
        b'["call", [{"dtype": "int32", "shape": [9]}]]',
        b'["call", [{"dtype": "int32", "shape": [99999999999999999999999]}]]',
        b"[" * 100_000,
    ],
)
def test_a_head_that_makes_no_sense_is_refused(head, ends):
    one, other = ends
    one.sendall(channel._LENGTHS.pack(len(head), len(head)) + head)
    with pytest.raises(ValueError, match="what came is no message"):
        channel.receive(other)
