"""Whatever ends, nothing waits for ever and nothing is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiny_text_model

from jpaged.errors import EngineDeadError
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.serving.engine_client import EngineProcessClient

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120  # never waited for unless a test fails
LONG = SamplingParams(
    temperature=0, max_tokens=90, ignore_eos=True, output_kind=RequestOutputKind.DELTA
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_text_model.write_model(tmp_path_factory.mktemp("m") / "m")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary files go; empty again after the test."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    assert not list(directory.iterdir())


def _run(test):
    async def limited():
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    asyncio.run(limited())


def _is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def _ids(client, request_id):
    return [o async for o in client.generate("hello", LONG, request_id)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_engine_ends_everything(model, temporary, number):
    async def test():
        client = await EngineProcessClient.start(tiny_text_model.options(model))
        pid = client.engine_pid
        os.kill(pid, signal.SIGSTOP)  # or it might be done before it is killed
        open_ones = [asyncio.create_task(_ids(client, str(i))) for i in range(3)]
        while len(client._streams) < 3:
            await asyncio.sleep(0)
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)
        message = rf"ended by signal {int(number)}"
        for task in open_ones:
            with pytest.raises(EngineDeadError, match=message):
                await task
        assert message in await client.wait_dead()
        for call in (client.check_health(), client.stats(), _ids(client, "x")):
            with pytest.raises(EngineDeadError, match=message):
                await call
        assert _is_gone(pid), "no zombie"
        await client.shutdown()

    _run(test)


def test_questions_to_a_dying_engine_end(model, temporary):
    async def test():
        client = await EngineProcessClient.start(tiny_text_model.options(model))
        os.kill(client.engine_pid, signal.SIGSTOP)
        question = asyncio.create_task(client.stats())
        await asyncio.sleep(0)
        os.kill(client.engine_pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="ended by signal 9"):
            await question
        await client.shutdown()

    _run(test)


def test_sigterm_and_ctrl_c_are_for_the_server_alone(model, temporary):
    async def test():
        client = await EngineProcessClient.start(tiny_text_model.options(model))
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(client.engine_pid, number)
        await client.stats()
        await client.check_health()
        await client.shutdown()

    _run(test)


def _engine_that(body):
    """A command that is an engine but for these lines."""
    code = f"import sys\nfrom jpaged.serving import engine_process\n{body}"
    return (sys.executable, "-c", f"{code}\nsys.exit(engine_process.main())")


def test_an_exception_in_a_step_is_the_reason_that_is_told(model, temporary, capfd):
    async def test():
        command = _engine_that(
            "from jpaged.engine import Engine\n"
            "def fail(self, scheduled): raise RuntimeError('device on fire')\n"
            "Engine._dispatch = fail"
        )
        client = await EngineProcessClient.start(tiny_text_model.options(model), command=command)
        with pytest.raises(EngineDeadError, match="ended with an error: device on fire"):
            await _ids(client, "a")
        with pytest.raises(EngineDeadError, match="device on fire"):
            await client.check_health()
        await client.shutdown()

    _run(test)
    assert "Traceback" in capfd.readouterr().err, "the engine's log has it all"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere"}, "model must be an existing directory"),
        ({"speed": 1}, "unknown engine option 'speed'"),
        ({"num_blocks": 3}, "the pool has"),
    ],
)
def test_an_engine_that_cannot_start_says_why_in_a_line(model, temporary, changes, message):
    async def test():
        with pytest.raises(ValueError, match=message) as raised:
            await EngineProcessClient.start(tiny_text_model.options(model) | changes)
        assert "\n" not in str(raised.value)

    _run(test)


def test_an_engine_that_dies_while_it_starts_is_noticed(temporary):
    async def test():
        with pytest.raises(EngineDeadError, match="ended with exit code 3"):
            await EngineProcessClient.start({}, command=(sys.executable, "-c", "exit(3)"))

    _run(test)


def test_cancelling_the_start_ends_the_engine(temporary):
    async def test():
        command = (sys.executable, "-c", "input()")
        start = asyncio.create_task(EngineProcessClient.start({}, command=command))
        await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start

    _run(test)


def test_the_engine_ends_when_the_server_is_killed(model, tmp_path):
    directory = tmp_path / "tmp"
    directory.mkdir()
    script = f"""
import asyncio
from jpaged.serving.engine_client import EngineProcessClient

async def main():
    client = await EngineProcessClient.start({tiny_text_model.options(model)!r})
    print(client.engine_pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(directory)},
    ) as server:
        assert server.stdout is not None
        engine = os.pidfd_open(int(server.stdout.readline()))
        assert not list(directory.iterdir()), "the sockets' files go as soon as they are connected"
        server.kill()
    try:
        # Readable once the process has ended; killed here only if the test fails.
        os.set_blocking(engine, False)
        import select

        assert select.select([engine], [], [], TIMEOUT_S)[0] == [engine]
    finally:
        os.close(engine)
