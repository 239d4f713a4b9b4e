"""Malformed requests by the thousand: a server must answer none of them with 5xx, and lose nothing.

Starts `jpaged serve` (or takes --url), sends requests that are wrong in every way that the protocol
has room for, and looks at what came back and at what the server still holds at the end.

    python -m benchmarks.fuzz_server --num-requests 20000 --seed 0
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import random
import socket
import sys
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import common
from jpaged.serving.protocol import CompletionRequest
from jpaged.serving.protocol_chat import (
    ChatCompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

BODY_TIMEOUT_S = 2.0
_ANSWER_TIMEOUT_S = 60.0
_COMPLETION = {"prompt": "the sea", "max_tokens": 2, "temperature": 0.0}
_CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": False}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": _COMPLETION,
    "/v1/chat/completions": _CHAT,
    "/tokenize": {"prompt": "the sea"},
    "/detokenize": {"tokens": [5, 6]},
}
_FIELDS = [
    *CompletionRequest.model_fields,
    *ChatCompletionRequest.model_fields,
    *TokenizeRequest.model_fields,
    *DetokenizeRequest.model_fields,
    "suffix",
    "nonsense",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Attack:
    """What is sent over one connection.

    Attributes:
        kind: What is wrong with it.
        pieces: Sent one after the other.
        stalls: Whether the client then waits, without having sent what it announced.
        leaves: Whether it closes its side after the last piece.
    """

    kind: str
    pieces: tuple[bytes, ...]
    stalls: bool = False
    leaves: bool = False


def attacks(seed: int) -> Iterator[Attack]:
    """Attacks without end, always the same for a seed."""
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random], Attack]] = [
        _bad_json,
        _wrong_types,
        _wrong_types,
        _huge_numbers,
        _deep_nesting,
        _invalid_utf8,
        _truncated,
        _odd_requests,
        _garbage,
    ]
    for i in range(sys.maxsize):
        yield _slow(rng) if i % 400 == 399 else rng.choice(kinds)(rng)


def _post(path: str, body: bytes, *, length: int | None = None, headers: bytes = b"") -> bytes:
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {length}\r\nConnection: close\r\n"
    return head.encode() + headers + b"\r\n" + body


def _pick(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice(list(ROUTES))
    return path, dict(ROUTES[path])


def _bad_json(rng: random.Random) -> Attack:
    path, fields = _pick(rng)
    text = bytearray(json.dumps(fields).encode())
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text) or 1)
        match rng.randrange(4):
            case 0:
                del text[place : place + rng.randint(1, 5)]
            case 1:
                text[place:place] = rng.choice([b"}", b"{", b'"', b",", b"NaN", b"\x00", b"\\u12"])
            case 2:
                text[place : place + 1] = bytes([rng.randrange(32, 127)])
            case _:
                del text[place:]
    return Attack("bad JSON", (_post(path, bytes(text)),))


def _any_value(rng: random.Random, depth: int = 0) -> Any:
    simple = [None, True, False, 0, -1, 1, 2**31, 2**63, 1.5, -1e308, "", "a", "\x00", "é🙂", "1"]
    if depth > 2 or rng.random() < 0.6:
        return rng.choice(simple)
    values = [_any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if rng.random() < 0.5:
        return values
    names = ["type", "json_schema", "schema", "regex", "function", "name", "role", "content", "a"]
    return {rng.choice(names): value for value in values}


def _wrong_types(rng: random.Random) -> Attack:
    path, fields = _pick(rng)
    for _ in range(rng.randint(1, 3)):
        fields[rng.choice(_FIELDS)] = _any_value(rng)
    return Attack("wrong types", (_post(path, json.dumps(fields).encode()),))


def _huge_numbers(rng: random.Random) -> Attack:
    path, fields = _pick(rng)
    fields[rng.choice(_FIELDS)] = "@"
    digits = "9" * rng.choice([20, 400, 5000])
    number = rng.choice([digits, f"-{digits}", "1e999", "-1e999", "1e-999", "Infinity", "-NaN"])
    return Attack(
        "huge numbers", (_post(path, json.dumps(fields).replace('"@"', number).encode()),)
    )


def _deep_nesting(rng: random.Random) -> Attack:
    path, fields = _pick(rng)
    fields[rng.choice(_FIELDS)] = "@"
    depth = rng.choice([99, 101, 1000, 100_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    inner = opening * depth + "1" + closing * rng.choice([depth, 0])
    return Attack("deep nesting", (_post(path, json.dumps(fields).replace('"@"', inner).encode()),))


def _invalid_utf8(rng: random.Random) -> Attack:
    path, fields = _pick(rng)
    fields[rng.choice(_FIELDS)] = "@@"
    bad = rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\\ud800"])
    return Attack("invalid UTF-8", (_post(path, json.dumps(fields).encode().replace(b"@@", bad)),))


def _truncated(rng: random.Random) -> Attack:
    path, fields = _pick(rng)
    whole = _post(path, json.dumps(fields).encode())
    return Attack("truncated", (whole[: rng.randrange(1, len(whole))],), leaves=True)


def _slow(rng: random.Random) -> Attack:
    path, fields = _pick(rng)
    body = json.dumps(fields).encode()
    head = _post(path, b"", length=len(body))
    return Attack("slow", (head, *(bytes([byte]) for byte in body[:5])), stalls=True)


def _odd_requests(rng: random.Random) -> Attack:
    path, fields = _pick(rng)
    body = json.dumps(fields).encode()
    odd = [
        _post(path, body, length=2**40),
        _post(path, body, headers=b"Content-Type: text/plain\r\n"),
        _post(path, body, headers=b"X-Request-Id: \x7f a\r\n"),
        _post(path, body, headers=b"Authorization: Bearer " + b"x" * 5000 + b"\r\n"),
        _post(path + "?" + "a=b&" * 100, body),
        _post(path + "/%00%ff", body),
        _post("/v1/models/" + "x" * 3000, body),
        _post(path, body).replace(b"POST", rng.choice([b"PUT", b"GET", b"DELETE", b"PATCH"]), 1),
        _post(path, body[:-1] + b',"n":1,"n":"x"}'),
        b"POST %b HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"
        % path.encode(),
    ]
    return Attack("odd requests", (rng.choice(odd),), leaves=True)


def _garbage(rng: random.Random) -> Attack:
    data = rng.choice(
        [
            rng.randbytes(rng.randrange(1, 400)),
            b"GET / HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"POST /ping HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
            b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n",
            b"\r\n" * 50,
        ]
    )
    return Attack("garbage", (data,), leaves=True)


async def send(attack: Attack, host: str, port: int) -> int:
    """Sends one attack and returns the status of the answer; 0 if there was none.

    Raises:
        OSError: The server takes no connection.
        TimeoutError: It neither answers nor closes.
    """
    reader, writer = await asyncio.open_connection(host, port)
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            with contextlib.suppress(ConnectionError):
                for piece in attack.pieces:
                    writer.write(piece)
                    await writer.drain()
                if attack.leaves:
                    writer.write_eof()
            with contextlib.suppress(ConnectionError):
                answer = await reader.read()
                status = answer.split(b" ", 2)[1:2]
                return int(status[0]) if status and status[0].isdigit() else 0
            return 0
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@dataclasses.dataclass(slots=True)
class Report:
    """What came back.

    Attributes:
        statuses: How often each status came for each kind of attack.
        failures: Attacks that were answered with 5xx or not at all.
    """

    statuses: dict[str, collections.Counter[int]]
    failures: list[tuple[Attack, str]]


async def fuzz(host: str, port: int, *, seed: int, num_requests: int, concurrency: int) -> Report:
    """Sends attacks, several at a time."""
    report = Report(collections.defaultdict(collections.Counter), [])
    source = attacks(seed)
    left = num_requests

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            attack = next(source)
            try:
                status = await send(attack, host, port)
            except (OSError, TimeoutError) as error:
                report.failures.append((attack, repr(error)))
                continue
            report.statuses[attack.kind][status] += 1
            if status >= 500:
                report.failures.append((attack, str(status)))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return report


async def get_json(host: str, port: int, path: str) -> Any:
    """The answer of a route that is well."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    if b" 200 " not in head.splitlines()[0]:
        raise RuntimeError(f"{path} answers {head.splitlines()[0]!r}")
    return json.loads(body) if body else None


def memory_bytes(pid: int) -> dict[str, int]:
    """Resident memory of the server's process and of its children, the engine's."""
    children = sum(_resident(child) for child in _children(pid))
    return {"http": _resident(pid), "engine": children}


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_children(int(child))]
    return found


@contextlib.asynccontextmanager
async def server(options: list[str]) -> AsyncIterator[tuple[str, int, int]]:
    """A `jpaged serve` of our own: host, port and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jpaged", "serve", *options, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--body-timeout", str(BODY_TIMEOUT_S), "--max-n", "4"]
    command += ["--log-level", "error"]
    process = await asyncio.create_subprocess_exec(*command)
    try:
        while True:
            if process.returncode is not None:
                raise RuntimeError(f"jpaged serve ended with exit code {process.returncode}")
            try:
                await get_json("127.0.0.1", port, "/health")
                break
            except OSError:
                await asyncio.sleep(0.2)
        yield "127.0.0.1", port, process.pid
        if process.returncode is not None:
            raise RuntimeError(f"jpaged serve ended with exit code {process.returncode}")
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns 1 if the server failed."""
    if args.url is not None:
        parts = urllib.parse.urlsplit(args.url)
        place = contextlib.nullcontext((parts.hostname, parts.port or 80, None))
    else:
        place = server(args.server_options)
    async with place as (host, port, pid):
        options = {"concurrency": args.concurrency, "seed": args.seed}
        # The first ones fill caches that are meant to stay, and compile what valid ones need.
        await fuzz(host, port, num_requests=args.num_warmups, **options)
        before = memory_bytes(pid) if pid else {}
        start = time.perf_counter()
        report = await fuzz(host, port, num_requests=args.num_requests, **options)
        seconds = time.perf_counter() - start
        after = memory_bytes(pid) if pid else {}
        await get_json(host, port, "/health")
        load = (await get_json(host, port, "/load"))["server_load"]
        counts = (await get_json(host, port, "/pool")).get("counts", {})
    rows = [
        (kind, " ".join(f"{status}:{count}" for status, count in sorted(statuses.items())))
        for kind, statuses in sorted(report.statuses.items())
    ]
    common.print_table(["attack", "answers (0: the connection was closed)"], rows)
    for attack, reason in report.failures[:20]:
        print(f"FAILED {reason}: {attack.kind} {b''.join(attack.pieces)[:300]!r}")
    result = {
        "num_requests": args.num_requests,
        "seed": args.seed,
        "num_warmups": args.num_warmups,
        "seconds": round(seconds, 1),
        "answers": dict(rows),
        "failures": len(report.failures),
        "open_requests_after": load,
        "used_blocks_after": counts.get("used", 0) + counts.get("shared", 0),
        "memory_bytes": after,
        "memory_growth_bytes": {name: after[name] - before[name] for name in after},
    }
    common.finish(result, args.json)
    return 1 if report.failures or load or result["used_blocks_after"] else 0


def main() -> int:
    """Reads the arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--num-requests", type=int, default=20_000)
    parser.add_argument("--num-warmups", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=32)
    common.add_output_argument(parser)
    parser.add_argument("server_options", nargs="*", help="options of jpaged serve, after --")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
