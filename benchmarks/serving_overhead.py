"""What `jpaged serve` itself costs: the whole HTTP path over an engine that costs nothing.

Throughput: so many connections stream at once, and the engine gives each a token a step. The steps
come at a rate that is raised as long as (nearly) every token still arrives in an event of its own;
beyond, the server puts tokens together. Latency: requests come at random, and their first token is
there at once, so what it takes until it arrives is the server's.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import common
from jpaged.serving.server import run_server
from jpaged.serving.settings import ServerSettings

PROMPT = "Tell me about the fox."


class Stream(asyncio.Protocol):
    """One streamed answer, only counted: the server's core is shared with what measures it."""

    def __init__(self, request: bytes, done: "asyncio.Future[None]") -> None:
        self.num_events = 0
        self.first_s = 0.0
        self.last_s = 0.0
        self.tail = b""
        self._request = request
        self._done = done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.start_s = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        count = data.count(b"data: {")
        if count:
            self.last_s = time.perf_counter()
            self.first_s = self.first_s or self.last_s
            self.num_events += count
        self.tail = (self.tail + data)[-600:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)


def _request(max_tokens: int) -> bytes:
    body = {"prompt": PROMPT, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def stream(port: int, max_tokens: int) -> Stream:
    """Reads one answer to its end."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    _, protocol = await loop.create_connection(
        lambda: Stream(_request(max_tokens), done), "127.0.0.1", port
    )
    await done
    found = re.search(rb'"completion_tokens":(\d+)', protocol.tail)
    if found is None or int(found[1]) != max_tokens:
        raise RuntimeError(f"the answer is not whole: {protocol.tail!r}")
    return protocol


async def throughput(port: int, pid: int, connections: int, max_tokens: int) -> dict[str, float]:
    """Tokens and events a second while all connections stream, and what they cost the server.

    The cost does not depend on what else the machine does; the rates do.
    """
    cpu_s = _cpu_s(pid)
    found = await asyncio.gather(*(stream(port, max_tokens) for _ in range(connections)))
    seconds = max(s.last_s for s in found) - min(s.first_s for s in found)
    # The first event of each stands at the beginning of the time, the usage is no token.
    events = sum(s.num_events - 2 for s in found)
    tokens = connections * (max_tokens - 1)
    return {
        "tokens_per_s": tokens / seconds,
        "events_per_s": events / seconds,
        "tokens_per_event": tokens / events,
        "cpu_us_per_event": 1e6 * (_cpu_s(pid) - cpu_s) / events,
        "cpu_share": (_cpu_s(pid) - cpu_s) / seconds,
    }


def _cpu_s(pid: int) -> float:
    """Processor time that a process has used, its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def latency(port: int, rate: float, seconds: float) -> dict[str, float]:
    """Times of requests that come at random, in milliseconds."""
    rng = random.Random(0)
    tasks = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        tasks.append(asyncio.create_task(stream(port, 16)))
        await asyncio.sleep(rng.expovariate(rate))
    found = await asyncio.gather(*tasks)
    first = sorted(1e3 * (s.first_s - s.start_s) for s in found)
    whole = sorted(1e3 * (s.last_s - s.start_s) for s in found)
    return {
        "requests": len(found),
        "first_token_median_ms": statistics.median(first),
        "first_token_p99_ms": first[int(0.99 * len(first))],
        "whole_16_tokens_median_ms": statistics.median(whole),
    }


@contextlib.contextmanager
def server(step_s: float) -> Iterator[tuple[int, int]]:
    """A server over the stub engine; its port and process id."""
    command = [sys.executable, "-m", "benchmarks.serving_overhead", "--serve", str(step_s)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = None
        for line in process.stderr:
            if found := re.search(r"is ready at http://127.0.0.1:(\d+)", line):
                break
        if found is None:
            sys.exit("the server did not start")
        try:
            yield int(found[1]), process.pid
        finally:
            process.terminate()


def serve(step_s: float) -> int:
    settings = ServerSettings(
        host="127.0.0.1",
        port=0,
        log_level="warning",
        disable_access_log=True,
        enable_log_requests=False,
    )
    command = (sys.executable, "-m", "benchmarks.stub_engine")
    return run_server({"step_s": step_s}, settings, engine_command=command)


def main() -> int:
    parser = argparse.ArgumentParser(description="What jpaged serve itself costs")
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rates", default="10000,20000,25000,30000", help="tokens/s to offer")
    parser.add_argument("--request-rate", type=float, default=10.0)
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    common.add_output_argument(parser)
    args = parser.parse_args()
    if args.serve is not None:
        return serve(args.serve)
    rows: list[dict[str, Any]] = []
    for rate in map(int, args.rates.split(",")):
        with server(args.connections / rate) as (port, pid):
            asyncio.run(throughput(port, pid, args.connections, 8))
            num_tokens = int(rate / args.connections * args.seconds)
            found = asyncio.run(throughput(port, pid, args.connections, num_tokens))
            rows.append({"offered": rate, **found})
    with server(0.0) as (port, _):
        asyncio.run(latency(port, 50.0, 1.0))
        times = asyncio.run(latency(port, args.request_rate, 2 * args.seconds))
    common.print_table(list(rows[0]), [list(row.values()) for row in rows])
    common.print_table(list(times), [list(times.values())])
    common.finish({"throughput": rows, "latency": times}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
