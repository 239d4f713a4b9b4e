"""A slice of benchmarks/fuzz_server.py: malformed requests over real connections."""

import asyncio

import live_server
import pytest

from benchmarks import fuzz_server
from jpaged.serving.app import create_app
from jpaged.serving.http_protocol import MAX_HEAD_BYTES, with_head_timeout
from jpaged.serving.settings import ServerSettings

TIMEOUT_S = 0.2
PROTOCOL = with_head_timeout(TIMEOUT_S)
NUM_REQUESTS = 799  # of which one is slow


@pytest.mark.parametrize("seed", [1, 2])
def test_no_malformed_request_is_our_fault(engine, seed):
    app = create_app(engine, ServerSettings(body_timeout_s=TIMEOUT_S))
    with live_server.serving(lambda: live_server.just(app), http=PROTOCOL) as url:
        host, port = url.removeprefix("http://").split(":")

        async def run():
            report = await fuzz_server.fuzz(
                host, int(port), seed=seed, num_requests=NUM_REQUESTS, concurrency=8
            )
            assert await fuzz_server.get_json(host, int(port), "/load") == {"server_load": 0}
            return report

        report = asyncio.run(run())
    assert not report.failures, report.failures[0]
    statuses = {status for counts in report.statuses.values() for status in counts}
    assert {200, 400, 404, 405, 408, 413} <= statuses, "the attacks reach every defence"
    assert not any(asked.is_open for asked in engine.asked)


def test_heads_have_bounds(engine):
    app = create_app(engine, ServerSettings())
    with live_server.serving(lambda: live_server.just(app), http=PROTOCOL) as url:
        host, port = url.removeprefix("http://").split(":")

        async def status(*pieces):
            attack = fuzz_server.Attack("", pieces, stalls=True)
            return await fuzz_server.send(attack, host, int(port))

        assert asyncio.run(status()) == 0
        assert asyncio.run(status(b"GET /health HTTP/1.1\r\n", b"A: b\r\n")) == 408
        endless = b"A: " + b"b" * (MAX_HEAD_BYTES // 4)
        # The answer is lost if the client was still writing when the connection was closed.
        assert asyncio.run(status(b"GET /health HTTP/1.1\r\n", *[endless] * 8)) in (431, 0)
        one = b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n"
        # The next request on the connection has bounds too.
        assert asyncio.run(status(one, b"GET ")) == 200
        assert asyncio.run(fuzz_server.get_json(host, int(port), "/load")) == {"server_load": 0}
