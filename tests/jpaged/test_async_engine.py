import asyncio
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jpaged import LLM, AsyncLLM, EngineDeadError, RequestOutputKind, SamplingParams

GREEDY = SamplingParams(
    temperature=0, max_tokens=10, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
)
DELTA = SamplingParams(
    temperature=0, max_tokens=60, ignore_eos=True, output_kind=RequestOutputKind.DELTA
)
TIMEOUT_S = 60  # never waited for unless a test fails
_rng = np.random.RandomState(5)
PROMPTS = [_rng.randint(3, 96, size=n).tolist() for n in _rng.randint(1, 40, size=20)]


@pytest.fixture(scope="module")
def expected(tiny_options):
    with LLM(**tiny_options) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture
def run(tiny_options):
    """Runs `test(llm)` in an event loop of its own, with an engine of its own."""
    with_engine = AsyncLLM(**tiny_options)

    def run(test):
        async def limited():
            async with asyncio.timeout(TIMEOUT_S):
                await test(with_engine)

        asyncio.run(limited())

    yield run
    with_engine.shutdown()


async def _ids(llm, prompt, params=GREEDY, request_id=None, **options):
    found = []
    async for output in llm.generate(prompt, params, request_id, **options):
        found += output.outputs[0].token_ids
    return found


async def _collect(llm, prompt, params, request_id=None):
    return [output async for output in llm.generate(prompt, params, request_id)]


async def _until(condition):
    """Waits for what the engine's thread does soon; the test's own limit ends it."""
    while not condition():
        await asyncio.sleep(0.001)


async def _settled(llm):
    """Waits until nothing runs, and checks that nothing is left behind."""
    await _until(lambda: not (llm._streams or llm._calls or llm.engine.has_unfinished))
    llm.engine.scheduler.check_invariants()
    assert llm.stats().scheduler.blocks.used == 0


def test_many_requests_at_once_get_what_they_get_offline(run, expected):
    async def test(llm):
        assert await asyncio.gather(*(_ids(llm, prompt) for prompt in PROMPTS)) == expected
        await _settled(llm)

    run(test)


def test_deltas_come_one_by_one_and_add_up(run, expected):
    async def test(llm):
        params = SamplingParams(
            temperature=0, max_tokens=10, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        outputs = await _collect(llm, PROMPTS[0], params, "mine")
        assert [i for o in outputs for i in o.outputs[0].token_ids] == expected[0]
        assert [len(o.outputs[0].token_ids) for o in outputs] == [1] * 10
        assert [o.finished for o in outputs] == [False] * 9 + [True]
        assert {o.request_id for o in outputs} == {"mine"}

    run(test)


def test_cancelling_the_reader_frees_its_blocks_and_spares_the_others(run, expected):
    async def test(llm):
        started = asyncio.Event()

        async def read():
            async for _ in llm.generate(PROMPTS[1], DELTA):
                started.set()

        reader = asyncio.create_task(read())
        other = asyncio.create_task(_ids(llm, PROMPTS[0]))
        await started.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert await other == expected[0]
        await _settled(llm)
        assert llm.stats().num_generated_tokens < 60 + 10, "it did not run to its end"

    run(test)


def test_a_cancelled_request_is_freed_within_a_step(run):
    async def test(llm):
        engine, told = llm.engine, []
        original = engine.step

        def step():
            told.append((len(llm._cancelled), engine.block_manager.pool.num_used_blocks))
            return original()

        engine.step = step
        stream = llm.generate(PROMPTS[1], DELTA)
        await anext(stream)
        await stream.aclose()
        await _settled(llm)
        engine.step = original
        cancelled = [used for count, used in told if count]
        assert cancelled[:1] == [0], "before the first step after the call"

    run(test)


def test_leaving_the_loop_aborts(run):
    async def test(llm):
        stream = llm.generate(PROMPTS[1], DELTA)
        async for _ in stream:
            break
        await stream.aclose()
        await _settled(llm)

    run(test)


def test_abort_ends_the_iterator_with_its_reason(run):
    async def test(llm):
        outputs = []
        async for output in llm.generate(PROMPTS[1], DELTA, "a"):
            outputs.append(output)
            if len(outputs) == 2:
                await llm.abort("a")
        assert outputs[-1].finished
        assert outputs[-1].outputs[0].finish_reason == "abort"
        assert sum(len(o.outputs[0].token_ids) for o in outputs) < 60
        await llm.abort("a")
        await llm.abort("nobody")
        await _settled(llm)

    run(test)


def _gate(function):
    """The function, which says when it has been called and waits to be let on."""
    entered, let = threading.Event(), threading.Event()

    def wrapper(*args, **kwargs):
        entered.set()
        assert let.wait(TIMEOUT_S)
        return function(*args, **kwargs)

    return wrapper, entered, let


def test_abort_while_the_prompt_is_being_read_is_not_lost(run):
    async def test(llm):
        engine, original = llm.engine, llm.engine.make_request
        engine.make_request, entered, let = _gate(original)
        task = asyncio.create_task(_collect(llm, PROMPTS[1], DELTA, "a"))
        await asyncio.to_thread(entered.wait)
        await llm.abort("a")
        let.set()
        outputs = await task
        engine.make_request = original
        assert [o.outputs[0].finish_reason for o in outputs] == ["abort"]
        await _settled(llm)

    run(test)


def test_cancelling_while_the_prompt_is_being_read_runs_nothing(run):
    async def test(llm):
        engine, original = llm.engine, llm.engine.make_request
        engine.make_request, entered, let = _gate(original)
        task = asyncio.create_task(_collect(llm, PROMPTS[1], DELTA, "a"))
        await asyncio.to_thread(entered.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        let.set()
        engine.make_request = original
        await _settled(llm)
        assert llm.stats().num_prompt_tokens == 0

    run(test)


def test_an_id_in_use_is_refused_and_its_owner_goes_on(run, expected):
    async def test(llm):
        first = asyncio.create_task(_ids(llm, PROMPTS[0], GREEDY, "a"))
        await _until(lambda: "a" in llm._streams)
        with pytest.raises(ValueError, match="request_id 'a' is already in use"):
            await _ids(llm, PROMPTS[1], GREEDY, "a")
        assert await first == expected[0]
        assert await _ids(llm, PROMPTS[1], GREEDY, "a") == expected[1], "it is free again"

    run(test)


def test_an_id_taken_again_after_a_cancellation_gets_its_own_outputs(run, expected):
    async def test(llm):
        for _ in range(5):
            stream = llm.generate(PROMPTS[1], DELTA, "a")
            await anext(stream)
            await stream.aclose()
            found = None
            while found is None:
                try:
                    found = await _ids(llm, PROMPTS[0], GREEDY, "a")
                except ValueError:  # in use until the engine has heard of it
                    await asyncio.sleep(0)
            assert found == expected[0]

    run(test)


def test_a_bad_request_disturbs_nobody(run, expected):
    async def test(llm):
        bad = [
            ([], GREEDY, {}, "prompt must have at least 1 token"),
            ([96], GREEDY, {}, r"prompt_token_ids must be in \[0, 95\]"),
            ([3], SamplingParams(logprobs=21), {}, "logprobs must be at most"),
            ([3], GREEDY, {"priority": 1}, 'priority needs an engine with policy="priority"'),
        ]
        good = asyncio.gather(*(_ids(llm, prompt) for prompt in PROMPTS[:4]))
        for prompt, params, options, message in bad:
            with pytest.raises(ValueError, match=message):
                await _ids(llm, prompt, params, "bad", **options)
        assert await good == expected[:4]
        await _settled(llm)

    run(test)


def test_the_event_loop_is_never_blocked(run):
    """A step that takes for ever, and the loop still runs."""

    async def test(llm):
        engine, original = llm.engine, llm.engine.step
        engine.step, entered, let = _gate(original)
        task = asyncio.create_task(_ids(llm, PROMPTS[0]))
        await asyncio.to_thread(entered.wait)
        for _ in range(100):
            await asyncio.sleep(0)
        await llm.check_health()
        await llm.abort("nobody")
        llm.stats()
        other = asyncio.create_task(_ids(llm, PROMPTS[1]))
        await _until(lambda: len(llm._calls) == 1)
        assert not task.done()
        let.set()
        await task
        await other
        engine.step = original

    run(test)


def test_stats_can_be_read_while_steps_run(run):
    async def test(llm):
        work = asyncio.gather(*(_ids(llm, prompt) for prompt in PROMPTS))
        while not work.done():
            assert llm.stats().scheduler.blocks.used >= 0
            await asyncio.sleep(0)
        await work

    run(test)


def test_stats_are_read_again_if_they_changed_meanwhile(run):
    async def test(llm):
        original = llm.engine.stats
        errors = [RuntimeError("dictionary changed size during iteration"), IndexError()]

        def stats():
            if errors:
                raise errors.pop()
            return original()

        llm.engine.stats = stats
        assert llm.stats() == original()

    run(test)


def test_shutdown_ends_open_iterators(run):
    async def test(llm):
        streams = [llm.generate(prompt, DELTA) for prompt in PROMPTS[:3]]
        for stream in streams:
            await anext(stream)
        assert llm.is_running
        await asyncio.to_thread(llm.shutdown)
        assert not llm.is_running
        for stream in streams:
            with pytest.raises(EngineDeadError, match="the engine was shut down"):
                async for _ in stream:
                    pass
        with pytest.raises(EngineDeadError, match="the engine was shut down"):
            await _ids(llm, PROMPTS[0])
        with pytest.raises(EngineDeadError, match="the engine was shut down"):
            await llm.check_health()
        llm.shutdown()

    run(test)


def test_the_context_manager_shuts_down(tiny_options):
    async def test():
        async with AsyncLLM(**tiny_options) as llm:
            assert llm.is_running
            assert await llm.get_tokenizer() is None
        assert not llm.is_running
        assert not llm._thread.is_alive()

    asyncio.run(test())


def test_an_engine_that_fails_ends_everything(run, caplog):
    async def test(llm):
        def fail(scheduled):
            raise RuntimeError("device on fire")

        streams = [llm.generate(prompt, DELTA) for prompt in PROMPTS[:3]]
        for stream in streams:
            await anext(stream)
        llm.engine.runner.dispatch = fail
        message = "the engine has ended with an error: device on fire"
        for stream in streams:
            with pytest.raises(EngineDeadError, match=message):
                async for _ in stream:
                    pass
        assert not llm.is_running
        for request_id in (None, "request-0"):
            with pytest.raises(EngineDeadError, match=message):
                await _ids(llm, PROMPTS[0], GREEDY, request_id)
        with pytest.raises(EngineDeadError, match=message):
            await llm.check_health()
        assert "the engine has ended with an error" in caplog.text

    run(test)


def test_a_request_that_comes_while_the_engine_fails_does_not_wait_for_ever(run):
    async def test(llm):
        engine, original = llm.engine, llm.engine.make_request
        engine.make_request, entered, let = _gate(original)
        task = asyncio.create_task(_ids(llm, PROMPTS[0]))
        await asyncio.to_thread(entered.wait)

        def fail():
            raise RuntimeError("device on fire")

        llm._call(fail)
        await asyncio.to_thread(llm._thread.join)
        let.set()
        with pytest.raises(EngineDeadError, match="device on fire"):
            await task

    run(test)


def test_requests_of_several_event_loops_share_the_engine(tiny_options, expected):
    llm = AsyncLLM(**tiny_options)
    found = {}

    def work(index):
        found[index] = asyncio.run(_ids(llm, PROMPTS[index]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert [found[i] for i in range(3)] == expected[:3]
    llm.shutdown()


def test_an_output_for_a_closed_loop_is_dropped(tiny_options):
    llm = AsyncLLM(**tiny_options)

    async def leave():
        stream = llm.generate(PROMPTS[0], DELTA)
        await anext(stream)
        return stream  # not closed; the loop ends

    asyncio.run(leave())
    deadline = time.monotonic() + TIMEOUT_S
    while llm.engine.has_unfinished and time.monotonic() < deadline:
        threading.Event().wait(0.001)
    assert llm.is_running
    assert not llm.engine.has_unfinished
    llm.shutdown()


def test_a_process_may_end_while_requests_run(tiny_options):
    script = f"""
import asyncio

from jpaged import AsyncLLM, SamplingParams


async def leave(llm):
    outputs = llm.generate([3, 4], SamplingParams(max_tokens=100, ignore_eos=True))
    await anext(outputs)


llm = AsyncLLM(**{tiny_options!r})
asyncio.run(leave(llm))
llm._thread.join = lambda join=llm._thread.join: (join(), print("ended"))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "ended\n"), ended.stderr


def test_bad_options_are_refused(tiny_options):
    with pytest.raises(ValueError, match="unknown engine option"):
        AsyncLLM(**tiny_options, speed="fast")
