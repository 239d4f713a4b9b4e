"""An engine in a process of its own gives what one in this process gives."""

import asyncio
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_text_model
import tokenizers

from jpaged import LLM, RequestOutputKind, SamplingParams
from jpaged.errors import EngineDeadError, QueueFullError
from jpaged.serving.engine_client import EngineProcessClient

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120  # never waited for unless a test fails
DELTA, CUMULATIVE = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE
LONG = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True, output_kind=DELTA)
SHORT = dataclasses.replace(LONG, max_tokens=4)

_MIX: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"seed": 1},
    {"seed": 2, "n": 3},
    {"seed": 3, "stop": ["e", "th"]},
    {"seed": 4, "stop": ["a"], "n": 4, "include_stop_str_in_output": True},
    {"seed": 5, "stop_token_ids": [7, 8, 9], "min_tokens": 5},
    {"seed": 6, "logprobs": 3, "prompt_logprobs": 2},
    {"seed": 7, "logprobs": 0, "n": 2},
    {"temperature": 0, "use_beam_search": True, "n": 2, "best_of": 3, "logprobs": 2},
    {"temperature": 0, "use_beam_search": True, "length_penalty": 2.0},
    {"seed": 8, "bad_words": ["the", "q"], "logit_bias": {5: 3.0}},
    {"seed": 9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "top_p": 0.9, "top_k": 20},
    {"seed": 10, "min_p": 0.05, "allowed_token_ids": list(range(3, 60))},
    {"seed": 11, "skip_special_tokens": False, "ignore_eos": True},
    {"seed": 12, "detokenize": False},
    {"seed": 13, "n": 2, "structured_outputs": {"regex": "[a-f]{2,9}[.]"}},
    # With a seed: without one it would draw when its grammar is compiled, whenever that is.
    {"temperature": 0, "seed": 14, "structured_outputs": {"choice": ["the fox", "a hen"]}},
    {},
    {"n": 2},
)
PROMPTS = ("hello there", "the quick 🙂 fox", "a", {"prompt_token_ids": [5, 6, 7] * 9})


def _requests(kind):
    """Requests of every sort; beam search has nothing to tell before its end."""
    for i, fields in enumerate(_MIX * 2):
        own = RequestOutputKind.FINAL_ONLY if fields.get("use_beam_search") else kind
        yield (
            PROMPTS[i % len(PROMPTS)],
            SamplingParams(max_tokens=6 + 5 * (i % 5), output_kind=own, **fields),
        )


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return tiny_text_model.options(tiny_text_model.write_model(tmp_path_factory.mktemp("m") / "m"))


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def client(options, loop):
    client = loop.run(EngineProcessClient.start(options))
    yield client
    loop.run(client.shutdown())


@pytest.fixture
def run(client, loop):
    """Runs `test(client)` and looks for what it has left behind."""

    def run(test):
        async def limited():
            async with asyncio.timeout(TIMEOUT_S):
                await test(client)
                stats = await client.stats()
                while stats["scheduler"]["num_running"]:
                    stats = await client.stats()
            assert stats["scheduler"]["blocks"]["used"] == 0
            assert stats["scheduler"]["num_waiting"] == 0
            assert [client._streams, client._requests.running, client._calls] == [{}, {}, {}]
            assert client._requests.num_running_seqs == 0

        loop.run(limited())

    return run


async def _collect(client, prompt, params, request_id="a", **options):
    return [output async for output in client.generate(prompt, params, request_id, **options)]


async def _ids(client, *request):
    outputs = await _collect(client, *request)
    return [i for output in outputs for i in output.outputs[0].token_ids]


def _assert_same(found, wanted):
    """All is equal but ids, times and what was cached; log-probabilities nearly.

    They depend on what else is in a step: matrices of other sizes are summed in another order.
    """
    assert _exact(found) == _exact(wanted)
    assert _numbers(found) == pytest.approx(_numbers(wanted), abs=1e-3)


def _exact(output):
    """What must be equal: texts, tokens, reasons, and the tokens of log-probabilities."""
    parts = [
        dataclasses.replace(
            part, logprobs=_named(part.logprobs), cumulative_logprob=None, score=None
        )
        for part in output.outputs
    ]
    return output.prompt, output.prompt_token_ids, _named(output.prompt_logprobs), parts


def _named(logprobs):
    return logprobs and [
        position and {i: (entry.rank, entry.decoded_token) for i, entry in position.items()}
        for position in logprobs
    ]


def _numbers(output):
    positions = list(output.prompt_logprobs or ())
    totals = []
    for part in output.outputs:
        positions += part.logprobs or ()
        totals += [part.cumulative_logprob or 0.0, part.score or 0.0]
    return totals + [entry.logprob for found in positions for entry in (found or {}).values()]


def _joined(outputs):
    """Deltas put together to what they would have been in one output."""
    last = outputs[-1]
    by_index = {}
    for output in outputs:
        for completion in output.outputs:
            known = by_index.get(completion.index)
            if known is not None:
                completion = dataclasses.replace(
                    completion,
                    text=known.text + completion.text,
                    token_ids=known.token_ids + completion.token_ids,
                    logprobs=None
                    if known.logprobs is None
                    else known.logprobs + (completion.logprobs or []),
                )
            by_index[completion.index] = completion
    return dataclasses.replace(last, outputs=[by_index[i] for i in sorted(by_index)])


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, RequestOutputKind.FINAL_ONLY])
def test_every_answer_is_the_one_of_an_engine_in_this_process(options, loop, kind):
    requests = list(_requests(kind))
    with LLM(**options) as llm:
        expected = llm.generate(*map(list, zip(*requests, strict=True)), use_tqdm=False)

    async def test():
        # Of its own: what requests without a seed draw depends on how many came before.
        client = await EngineProcessClient.start(options)
        try:
            return await asyncio.gather(
                *(
                    _collect(client, prompt, params, str(i))
                    for i, (prompt, params) in enumerate(requests)
                )
            )
        finally:
            await client.shutdown()

    for found, wanted in zip(loop.run(test()), expected, strict=True):
        whole = _joined(found) if kind is DELTA else found[-1]
        _assert_same(whole, wanted)
        assert [output.finished for output in found] == [False] * (len(found) - 1) + [True]


def test_times_and_cached_tokens_arrive(run):
    async def test(client):
        await _collect(client, [9] * 40, SHORT)
        output = (await _collect(client, [9] * 40, SHORT))[-1]
        assert output.num_cached_tokens == 32
        times = output.metrics
        assert (
            times.arrival_time_s
            < times.first_scheduled_time_s
            < times.first_token_time_s
            < times.finished_time_s
        )

    run(test)


def test_preemptions_are_told(options, loop):
    async def test():
        client = await EngineProcessClient.start({**options, "num_blocks": 20, "max_num_seqs": 3})
        try:
            found = await asyncio.gather(
                *(_collect(client, "hello", LONG, str(i)) for i in range(3))
            )
            stats = await client.stats()
        finally:
            await client.shutdown()
        told = [outputs[-1].metrics.num_preemptions for outputs in found]
        assert sum(told) == stats["scheduler"]["num_preemptions"] > 0

    loop.run(test())


def test_leaving_frees_the_blocks_within_a_step(run):
    async def test(client):
        outputs = client.generate("hello", LONG, "a")
        await anext(outputs)
        await outputs.aclose()
        stats = await client.stats()
        assert stats["scheduler"]["blocks"]["used"] == 0, "the question came after the abort"

    run(test)


def test_a_cancelled_reader_frees_its_blocks_and_spares_the_others(run):
    async def test(client):
        expected = await _collect(client, "the", LONG, "x")
        reader = asyncio.create_task(_collect(client, "hello", LONG, "a"))
        other = asyncio.create_task(_collect(client, "the", LONG, "b"))
        while "a" not in client._streams:
            await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert _joined(await other).outputs == _joined(expected).outputs

    run(test)


@pytest.mark.parametrize("beams", [False, True])
def test_abort_ends_the_iterator_with_its_reason(run, beams):
    async def test(client):
        params = LONG
        if beams:
            params = SamplingParams(temperature=0, use_beam_search=True, n=2, max_tokens=90)
        task = asyncio.create_task(_collect(client, "hello", params))
        while not client._requests.running:
            await asyncio.sleep(0)
        await client.abort("a")
        await client.abort("nobody")
        last = (await task)[-1]
        assert last.finished
        assert {completion.finish_reason for completion in last.outputs} == {"abort"}

    run(test)


def test_abort_while_a_long_prompt_is_read_is_not_lost(run):
    async def test(client):
        task = asyncio.create_task(_collect(client, "hello " * 1000, LONG))
        await asyncio.sleep(0)
        await client.abort("a")
        with pytest.raises(ValueError, match="prompt must be at most 127 tokens"):
            await task
        task = asyncio.create_task(_collect(client, {"prompt": "z" * 3000 + "🙂"}, LONG))
        await asyncio.sleep(0)
        assert client._requests.num_being_read == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(test)


def test_a_slow_reader_gets_all_in_few_outputs(run):
    async def test(client):
        outputs = client.generate("hello", LONG, "a")
        found = [await anext(outputs)]
        while client._requests.running:
            await asyncio.sleep(0)
        found += [output async for output in outputs]
        assert len(found) <= 2, "what came meanwhile is one output"
        assert _joined(found).outputs == _joined(await _collect(client, "hello", LONG)).outputs

    run(test)


def test_bad_requests_are_refused_and_disturb_nobody(run):
    async def test(client):
        bad = [
            ([], SHORT, {}, "prompt must have at least 1 token"),
            ([96], SHORT, {}, r"prompt_token_ids must be in \[0, 95\]"),
            ("a", SamplingParams(logprobs=21), {}, "logprobs must be at most"),
            ("a", SHORT, {"priority": 1}, 'priority needs an engine with policy="priority"'),
            # Only the engine knows what its sampler can ban at once, and what a grammar means.
            ("a", SamplingParams(structured_outputs={"regex": "("}), {}, "regex"),
            ("a", SamplingParams(stop_token_ids=range(3, 60), min_tokens=2), {}, "at most 32"),
        ]
        good = asyncio.create_task(_collect(client, "hello", LONG, "good"))
        for prompt, params, options, message in bad:
            with pytest.raises(ValueError, match=message):
                await _collect(client, prompt, params, "bad", **options)
        assert (await good)[-1].outputs[0].finish_reason == "length"

    run(test)


def test_an_id_in_use_is_refused_and_free_again_after(run):
    async def test(client):
        first = client.generate("hello", LONG, "a")
        await anext(first)
        with pytest.raises(ValueError, match="request_id 'a' is already in use"):
            await _collect(client, "hello", LONG)
        await first.aclose()
        assert len(await _ids(client, "hello", SHORT)) == 4

    run(test)


def test_a_text_that_cannot_be_made_fails_its_request_alone(run, monkeypatch, caplog):
    async def test(client):
        def fail(self, ids):
            raise RuntimeError("no such character")

        other = asyncio.create_task(
            _collect(client, "hello", dataclasses.replace(LONG, detokenize=False), "other")
        )
        with monkeypatch.context() as patch:
            patch.setattr("jpaged.tokenizer.IncrementalDetokenizer.append", fail)
            with pytest.raises(RuntimeError, match="could not be made: no such character"):
                await _collect(client, "hello", LONG)
        assert (await other)[-1].outputs[0].finish_reason == "length"
        assert "could not be made" in caplog.text

    run(test)


def test_the_pool_can_be_seen(run):
    async def test(client):
        # So many that some still run when the question arrives.
        tasks = [asyncio.create_task(_collect(client, "hello", LONG, str(i))) for i in range(16)]
        await _collect(client, "hello", SHORT, "first", fairness_key="other")
        view = await client.pool_view()
        await asyncio.gather(*tasks)
        assert view["block_size"] == 8
        ids = {sequence[0] for sequence in view["sequences"]}
        assert ids
        assert ids <= {str(i) for i in range(16)}

    run(test)


def test_too_much_is_refused(options, loop):
    async def test():
        client = await EngineProcessClient.start(
            {**options, "max_num_seqs": 1}, max_num_queued_reqs=1
        )
        try:
            running = [client.generate("hello", LONG, str(i)) for i in range(3)]
            tasks = [asyncio.create_task(anext(outputs)) for outputs in running]
            await asyncio.sleep(0)
            assert len(client._requests.running) == 2, "one that runs, and one to follow it at once"
            assert client._queue.num_waiting == 1
            with pytest.raises(QueueFullError, match="max_num_queued_reqs=1"):
                await _collect(client, "hello", LONG, "c")
            await client.abort("2")
            assert (await tasks[2]).outputs[0].finish_reason == "abort", "it waits no longer"
            assert len(await _ids(client, "hello", SHORT, "d")) == 4
            await asyncio.gather(*tasks[:2])
            for outputs in running:
                await outputs.aclose()
        finally:
            await client.shutdown()

    loop.run(test())


def test_shutdown_lets_requests_finish_and_refuses_new_ones(options, loop):
    async def test():
        client = await EngineProcessClient.start(options)
        task = asyncio.create_task(_collect(client, "hello", LONG))
        while not client._requests.running:
            await asyncio.sleep(0)
        ending = asyncio.create_task(client.shutdown(TIMEOUT_S))
        await asyncio.sleep(0)
        with pytest.raises(EngineDeadError, match="shutting down"):
            await _collect(client, "hello", LONG, "b")
        with pytest.raises(EngineDeadError, match="shutting down"):
            await client.check_health()
        assert (await task)[-1].outputs[0].finish_reason == "length"
        await ending

    loop.run(test())


def test_shutdown_aborts_what_has_no_time_left(options, loop):
    async def test():
        client = await EngineProcessClient.start(options)
        task = asyncio.create_task(_collect(client, "hello", LONG))
        while not client._requests.running:
            await asyncio.sleep(0)
        await client.shutdown(0.0)
        assert (await task)[-1].outputs[0].finish_reason == "abort"

    loop.run(test())


def test_the_http_process_imports_no_jax():
    code = "import sys, jpaged.serving.server; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "False\n"


def test_the_tokenizer_is_the_models_own(run):
    async def test(client):
        assert isinstance(client.tokenizer.backend, tokenizers.Tokenizer)
        assert client.info.vocab_size == 96

    run(test)


def test_one_client_with_many_requests_does_not_starve_another(run):
    async def test(client):
        ended = []

        async def ask(key, number):
            await _collect(client, "hello", SHORT, f"{key}{number}", fairness_key=key)
            ended.append(key)

        greedy = [asyncio.create_task(ask("greedy", i)) for i in range(60)]
        while len(client._streams) < 60:
            await asyncio.sleep(0)
        modest = [asyncio.create_task(ask("modest", i)) for i in range(2)]
        await asyncio.gather(*greedy, *modest)
        # Before it: those that the engine had already, and one of the other's turns for each.
        last = max(i for i, key in enumerate(ended) if key == "modest")
        assert last < 30

    run(test)
