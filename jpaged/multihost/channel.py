"""Messages between two hosts over TCP: a call's name, numbers, and arrays as they lie in memory.

Nothing that is read is ever executed: the head of a message is JSON, the rest raw numbers of the
dtypes below.
"""

import json
import socket
import struct
from typing import Any

import numpy as np

MAX_BYTES = 1 << 31
"""Of a message; the largest of ours, masks of every row, has some 10 MB."""
_LENGTHS = struct.Struct("<QI")  # of the whole message after these, and of its head
_ALIGNMENT = 64
_DTYPES = {"int32", "float32"}


def encode(call: str, *args: Any) -> bytes:
    """A message: what to call with which arguments, NumPy arrays or what JSON knows."""
    arrays = [np.ascontiguousarray(arg) for arg in args if isinstance(arg, np.ndarray)]
    for array in arrays:
        assert str(array.dtype) in _DTYPES, f"no dtype of messages: {array.dtype}"
    shown = [
        {"dtype": str(arg.dtype), "shape": arg.shape} if isinstance(arg, np.ndarray) else arg
        for arg in args
    ]
    head = json.dumps([call, shown], separators=(",", ":")).encode()
    head += b" " * (-(_LENGTHS.size + len(head)) % _ALIGNMENT)
    size = len(head) + sum(array.nbytes for array in arrays)
    return b"".join([_LENGTHS.pack(size, len(head)), head, *(a.tobytes() for a in arrays)])


def receive(connection: socket.socket, max_bytes: int = MAX_BYTES) -> tuple[str, list[Any]]:
    """The next message's call and arguments; waits for it.

    Raises:
        ConnectionError: The connection has ended, before a message or within one.
        ValueError: What came is no message, or longer than `max_bytes`.
    """
    size, head_size = _LENGTHS.unpack(_read(connection, _LENGTHS.size))
    if not head_size <= size <= max_bytes:
        raise ValueError(f"a message must have at most {max_bytes} bytes, got {size}")
    body = _read(connection, size)
    try:
        return _decode(body, head_size)
    except (KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"what came is no message: {error}") from error


def _decode(body: bytearray, head_size: int) -> tuple[str, list[Any]]:
    call, args = json.loads(bytes(body[:head_size]))
    start, found = head_size, []
    for arg in args:
        if isinstance(arg, dict):
            if arg["dtype"] not in _DTYPES:
                raise ValueError(f"a message's arrays must be of {_DTYPES}, got {arg['dtype']!r}")
            dtype, count = np.dtype(arg["dtype"]), int(np.prod(arg["shape"]))
            found.append(np.frombuffer(body, dtype, count, start).reshape(arg["shape"]))
            start += count * dtype.itemsize
        else:
            found.append(arg)
    return call, found


def _read(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, start = memoryview(data), 0
    while start < size:
        count = connection.recv_into(view[start:])
        if not count:
            raise ConnectionError("the connection was closed")
        start += count
    return data
