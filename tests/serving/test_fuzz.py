"""A slice of benchmarks/fuzz_server.py: malformed requests over real connections."""

import asyncio

import live_server
import pytest

from benchmarks import fuzz_server
from jpaged.serving.app import create_app
from jpaged.serving.settings import ServerSettings

NUM_REQUESTS = 799  # of which one is slow


@pytest.mark.parametrize("seed", [1, 2])
def test_no_malformed_request_is_our_fault(engine, seed):
    app = create_app(engine, ServerSettings(body_timeout_s=0.2))
    with live_server.serving(lambda: live_server.just(app)) as url:
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
