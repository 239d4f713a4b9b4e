import numpy as np
import pytest

from jpaged import LLM, RequestOutputKind, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
DELTA = SamplingParams(
    temperature=0,
    max_tokens=10,
    ignore_eos=True,
    logprobs=1,
    output_kind=RequestOutputKind.DELTA,
)
_rng = np.random.RandomState(5)
PROMPTS = [_rng.randint(3, 96, size=n).tolist() for n in (9, 20, 3, 33, 14)]


@pytest.fixture(scope="module")
def llm(tiny_options):
    with LLM(**tiny_options) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm):
    """Each prompt's greedy continuation, run alone."""
    return [_ids(llm.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(llm):
    yield
    assert not llm.engine.has_unfinished
    llm.engine.scheduler.check_invariants()
    assert llm.stats().scheduler.blocks.used == 0


def _ids(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_results_come_in_the_order_of_the_prompts(llm, expected):
    lengths = [10, 2, 7, 1, 4]  # they end in another order
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    assert _ids(outputs) == [ids[:n] for ids, n in zip(expected, lengths, strict=True)]
    assert all(output.finished for output in outputs)


@pytest.mark.parametrize(
    "prompts",
    [
        PROMPTS[0],
        tuple(PROMPTS[0]),
        np.array(PROMPTS[0]),
        [PROMPTS[0]],
        {"prompt_token_ids": PROMPTS[0]},
        [{"prompt_token_ids": np.array(PROMPTS[0])}],
        iter([PROMPTS[0]]),
    ],
)
def test_one_prompt_may_be_given_in_many_forms(llm, expected, prompts):
    assert _ids(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected[:1]


def test_defaults_are_those_of_sampling_params(llm):
    (output,) = llm.generate(PROMPTS[0], use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 16


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_generate_returns_whole_outputs_whatever_kind_was_asked(llm, expected, kind):
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, output_kind=kind)
    assert _ids(llm.generate(PROMPTS[:2], params, use_tqdm=False)) == expected[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "prompts must have at least 1 prompt, got 0"),
        ((b"abc",), "prompt_token_ids must be a list of integers, got bytes"),
        ((PROMPTS, [GREEDY]), r"sampling_params must be one for all or one a prompt \(5\), got 1"),
        ((PROMPTS, []), r"sampling_params must be one for all or one a prompt \(5\), got 0"),
        (([PROMPTS[0], [96]], GREEDY), r"prompt_token_ids must be in \[0, 95\], got 96"),
    ],
)
def test_bad_calls_are_refused_before_anything_runs(llm, arguments, message):
    num_steps = llm.stats().scheduler.num_steps
    with pytest.raises(ValueError, match=message):
        llm.generate(*arguments, use_tqdm=False)
    assert llm.stats().scheduler.num_steps == num_steps


def test_priority_needs_its_policy(llm):
    with pytest.raises(ValueError, match='priority needs an engine with policy="priority"'):
        llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False, priority=[0, 1])


def test_priority_runs_lower_values_first(tiny_options, expected):
    options = tiny_options | {"policy": "priority", "max_num_seqs": 1}
    with LLM(**options) as llm:
        outputs = llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False, priority=[5, 0, -1])
        assert _ids(outputs) == expected[:3]
        ended = [output.metrics.finished_time_s or 0 for output in outputs if output.metrics]
        assert ended == sorted(ended, reverse=True)
        with pytest.raises(ValueError, match=r"priority must be one for all or one a prompt \(3\)"):
            llm.generate(PROMPTS[:3], GREEDY, priority=[1])
        with pytest.raises(ValueError, match="priority must be an integer, got 'high'"):
            llm.generate(PROMPTS[:1], GREEDY, priority=["high"])  # pyright: ignore[reportArgumentType]


def test_stream_of_deltas_adds_up_to_the_whole(llm, expected):
    outputs = list(llm.stream(PROMPTS[1], DELTA))
    completions = [output.outputs[0] for output in outputs]
    assert [i for c in completions for i in c.token_ids] == expected[1]
    assert len(outputs) == 10, "one a token"
    assert all(len(c.logprobs) == len(c.token_ids) for c in completions)
    assert [output.finished for output in outputs] == [False] * 9 + [True]
    assert completions[-1].finish_reason == "length"


def test_stream_is_cumulative_unless_asked(llm, expected):
    found = _ids(llm.stream(PROMPTS[1], GREEDY))
    assert found == [expected[1][:n] for n in range(1, 11)]


def test_closing_a_stream_aborts_and_frees(llm, expected):
    stream = llm.stream(PROMPTS[3], GREEDY)
    next(stream)
    assert llm.stats().scheduler.blocks.used > 0
    stream.close()
    assert llm.stats().scheduler.blocks.used == 0
    assert not llm.engine.has_unfinished
    assert _ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_a_stream_that_nobody_reads_runs_nothing_but_is_checked(llm):
    llm.stream(PROMPTS[0], GREEDY)
    assert not llm.engine.has_unfinished
    with pytest.raises(ValueError, match="prompt must have at least 1 token"):
        llm.stream([], GREEDY)


def test_streams_and_generate_do_not_take_each_others_outputs(llm, expected):
    first, second = (llm.stream(prompt, DELTA) for prompt in PROMPTS[:2])
    found = [[], []]
    for pair in zip(first, second, strict=True):
        for ids, output in zip(found, pair, strict=True):
            ids += output.outputs[0].token_ids
        if len(found[0]) == 4:
            assert _ids(llm.generate(PROMPTS[2:], GREEDY, use_tqdm=False)) == expected[2:]
    assert found == expected[:2]


def test_closing_one_stream_leaves_the_other(llm, expected):
    first, second = (llm.stream(prompt, DELTA) for prompt in PROMPTS[:2])
    ids = next(second).outputs[0].token_ids
    next(first)
    first.close()
    assert ids + [i for o in second for i in o.outputs[0].token_ids] == expected[1]


def test_progress_tells_tokens_a_second(llm, capsys):
    llm.generate(PROMPTS[:2], GREEDY)
    told = capsys.readouterr().err
    assert "Processed prompts: 100%" in told
    assert "2/2" in told
    assert "tok/s, output" in told
    llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def _interrupted(function, count, error, *, after):
    """The function, which raises once in its `count`-th call, before or after its work."""
    calls = iter(range(1, 10**6))

    def wrapper(*args):
        call = next(calls)
        if call == count and not after:
            raise error
        result = function(*args)
        if call == count:
            raise error
        return result

    return wrapper


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=repr)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("count", [1, 4])
def test_a_failed_step_leaves_the_engine_clean_and_usable(
    llm, expected, monkeypatch, count, after, error
):
    runner = llm.engine.runner
    longer = [prompt + [7] * 8 for prompt in PROMPTS]  # full blocks that are not cached yet
    with monkeypatch.context() as patch:
        patch.setattr(runner, "dispatch", _interrupted(runner.dispatch, count, error, after=after))
        with pytest.raises(type(error)):
            llm.generate(longer, GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished
    assert llm.stats().scheduler.blocks.used == 0
    assert llm.stats().scheduler.blocks.cached == 0, "nothing was filled that would be found"
    assert _ids(llm.generate(longer, GREEDY, use_tqdm=False)) == _fresh(llm, longer)
    assert _ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def _fresh(llm, prompts):
    """The same once more with an empty prefix cache."""
    llm.engine.reset()
    return _ids(llm.generate(prompts, GREEDY, use_tqdm=False))


def test_pools_lost_with_a_step_are_replaced(llm, expected, monkeypatch):
    runner = llm.engine.runner
    dispatch = runner.dispatch

    def lose(scheduled):
        handle = dispatch(scheduled)
        for array in (*runner.worker.pools, runner.worker.state.last_tokens):
            array.delete()
        raise KeyboardInterrupt(handle)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "dispatch", lose)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert _ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_a_stream_ends_with_abort_if_another_calls_step_fails(llm, monkeypatch):
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(
            llm.engine.runner,
            "dispatch",
            _interrupted(llm.engine.runner.dispatch, 2, KeyboardInterrupt(), after=True),
        )
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS[1:], GREEDY, use_tqdm=False)
    *_, last = stream
    assert last.outputs[0].finish_reason == "abort"


def test_an_interrupt_between_steps_leaves_the_engine_clean(llm, expected, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jpaged.llm._Progress.add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)
    assert not llm.engine.has_unfinished
    assert _ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


@pytest.mark.parametrize("threshold", [1, 3])
def test_prompt_logprobs_do_not_depend_on_chunks(llm, tiny_options, threshold):
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, ignore_eos=True)
    whole = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].prompt_logprobs
    with LLM(**tiny_options | {"long_prefill_token_threshold": threshold}) as other:
        chunks = other.generate(PROMPTS[0], params, use_tqdm=False)[0].prompt_logprobs
    assert whole is not None
    assert chunks is not None
    assert chunks[0] is None
    for chunk, entry in zip(chunks[1:], whole[1:], strict=True):
        assert chunk is not None
        assert entry is not None
        assert {i: e.rank for i, e in chunk.items()} == {i: e.rank for i, e in entry.items()}
        for token_id, logprob in chunk.items():
            assert logprob.logprob == pytest.approx(entry[token_id].logprob, abs=1e-4)


def test_text_calls_need_a_tokenizer(llm):
    message = "this model has no tokenizer: prompts must be token ids"
    with pytest.raises(ValueError, match=message):
        llm.get_tokenizer()
    with pytest.raises(ValueError, match=message):
        llm.chat([{"role": "user", "content": "hello"}])
    with pytest.raises(ValueError, match="messages must have at least 1 message, got 0"):
        llm.chat([])


def test_shutdown_lets_go_of_the_devices_memory(tiny_options):
    llm = LLM(**tiny_options)
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    runner = llm.engine.runner
    llm.shutdown()
    llm.shutdown()
    assert not [name for name in vars(runner) if name == "loaded"]
    assert (runner.worker.pools, runner.worker.params, runner.worker.state) == ((), None, None)
    with pytest.raises(RuntimeError, match="the engine was shut down"):
        llm.validate_request(PROMPTS[0])
