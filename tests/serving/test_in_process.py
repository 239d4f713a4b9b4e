import asyncio
import json

import pytest
import tiny_text_model

from jpaged import AsyncLLM, SamplingParams
from jpaged.errors import EngineDeadError
from jpaged.sampling_params import RequestOutputKind
from jpaged.serving.in_process import InProcessEngine

DELTA = RequestOutputKind.DELTA
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, output_kind=DELTA)
TIMEOUT_S = 60  # never waited for unless a test fails


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    model = tiny_text_model.write_model(tmp_path_factory.mktemp("m") / "m")
    return tiny_text_model.options(model)


@pytest.fixture
def run(options):
    """Runs `test(engine)` with an engine of its own."""

    def run(test):
        async def limited():
            async with asyncio.timeout(TIMEOUT_S):
                engine = InProcessEngine(AsyncLLM(**options))
                try:
                    await test(engine)
                finally:
                    await engine.shutdown()

        asyncio.run(limited())

    return run


async def read(engine, params=LONG, request_id="a"):
    return [output async for output in engine.generate("the sea", params, request_id)]


def test_it_is_the_engine_that_http_wants(run, options):
    async def test(engine):
        assert engine.info.model == options["model"]
        assert engine.info.max_model_len == 128
        assert engine.info.num_blocks == 80
        outputs = await read(engine)
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == 60
        for plain in (await engine.stats(), await engine.pool_view()):
            json.dumps(plain)
        assert (await engine.stats())["num_generated_tokens"] == 60
        await engine.check_health()

    run(test)


def test_abort_ends_a_request(run):
    async def test(engine):
        reasons = []
        async for output in engine.generate("the sea", LONG, "mine"):
            reasons.append(output.outputs[0].finish_reason)
            await engine.abort("mine")
        assert reasons[-1] == "abort"

    run(test)


@pytest.mark.parametrize("timeout_s", [TIMEOUT_S, 0.0])
def test_shutdown_lets_open_requests_go_on_for_its_time(run, timeout_s):
    async def test(engine):
        started, tokens, ended = asyncio.Event(), [], []

        async def reader():
            try:
                async for output in engine.generate("the sea", LONG, "a"):
                    tokens.extend(output.outputs[0].token_ids)
                    started.set()
            except EngineDeadError as error:
                ended.append(error)

        reading = asyncio.create_task(reader())
        await started.wait()
        stopping = asyncio.create_task(engine.shutdown(timeout_s))
        await asyncio.sleep(0)
        with pytest.raises(EngineDeadError, match="shutting down"):
            await read(engine, request_id="b")
        await asyncio.gather(stopping, reading)
        assert len(tokens) == 60 or ended
        assert not (timeout_s and ended)
        with pytest.raises(EngineDeadError):
            await engine.check_health()

    run(test)
