import asyncio
import dataclasses

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jpaged.errors import EngineDeadError
from jpaged.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.serving.engine import EngineInfo
from jpaged.serving.metrics import Metrics

DELTA = SamplingParams(n=1, max_tokens=7, output_kind=RequestOutputKind.DELTA)
STATS = {
    "scheduler": {
        "num_waiting": 2,
        "num_running": 3,
        "num_preemptions": 4,
        "num_steps": 9,
        "num_swapped": 0,
        "blocks": {
            "num_blocks": 10,
            "used": 5,
            "free": 5,
            "cached": 2,
            "shared": 1,
            "saved": 1,
            "wasted_slots": 6,
            "copies": 7,
            "evictions": 0,
            "prefix_queried_tokens": 20,
            "prefix_hit_tokens": 8,
            "host_used": 0,
            "swapped_out": 1,
            "swapped_in": 0,
        },
    },
    "num_prompt_tokens": 30,
    "num_generated_tokens": 40,
    "num_discarded_tokens": 1,
    "num_compilations_after_warmup": 11,
    "num_rejected_reqs": 12,
    "step_tokens": {"counts": [1, 2] + [0] * 11 + [1], "sum": 20_010},
}
INFO = EngineInfo(
    model="/secret/path/model",
    max_model_len=128,
    max_num_seqs=4,
    vocab_size=96,
    max_logprobs=20,
    policy="fcfs",
    block_size=8,
    num_blocks=11,
)


class FakeEngine:
    """Answers with `answer`, or raises it."""

    info = INFO
    answer: object = STATS

    async def stats(self):
        if isinstance(self.answer, BaseException):
            raise self.answer
        if self.answer is None:
            await asyncio.Event().wait()
        return self.answer


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def metrics(engine):
    return Metrics(engine)


def _samples(metrics):
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return {
        (sample.name, *sorted((k, v) for k, v in sample.labels.items() if k != "model_name")): (
            sample.value
        )
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def _output(num_tokens, *, finish=None, times=None, parts=1):
    completions = [
        CompletionOutput(i, "x", [1] * num_tokens, None, None, finish) for i in range(parts)
    ]
    return RequestOutput("a", "p", [1, 2, 3], completions, finish is not None, metrics=times)


def test_the_engines_counters_are_told(metrics):
    asyncio.run(metrics.refresh())
    found = _samples(metrics)
    assert found["jpaged:num_requests_running",] == 3
    assert found["jpaged:num_requests_waiting",] == 2
    assert found["jpaged:kv_cache_usage_perc",] == 0.5
    assert found["jpaged:prompt_tokens_total",] == 30
    assert found["jpaged:generation_tokens_total",] == 40
    assert found["jpaged:prefix_cache_hits_total",] == 8
    assert found["jpaged:admission_rejections_total",] == 12
    assert found["jpaged:compilations_after_warmup_total",] == 11
    assert found["jpaged:blocks_copied_total",] == 7
    assert found["jpaged:slots_wasted",] == 6
    assert found["jpaged:iteration_tokens_total_bucket", ("le", "8.0")] == 3
    assert found["jpaged:iteration_tokens_total_count",] == 4
    assert found["jpaged:iteration_tokens_total_sum",] == 20_010


def test_the_last_counters_stay_when_the_engine_does_not_answer(metrics, engine, monkeypatch):
    asyncio.run(metrics.refresh())
    monkeypatch.setattr("jpaged.serving.metrics._ANSWER_TIMEOUT_S", 0.0)
    for engine.answer in (EngineDeadError("gone"), None):
        asyncio.run(metrics.refresh())
        assert _samples(metrics)["jpaged:num_requests_running",] == 3


def test_an_engine_without_a_queue_tells_the_rest(metrics, engine):
    engine.answer = {
        k: v for k, v in STATS.items() if k not in ("num_rejected_reqs", "step_tokens")
    }
    asyncio.run(metrics.refresh())
    found = _samples(metrics)
    assert ("jpaged:admission_rejections_total",) not in found
    assert found["jpaged:prompt_tokens_total",] == 30


def test_the_models_path_is_not_told(metrics):
    asyncio.run(metrics.refresh())
    assert b"secret" not in metrics.render()[0]
    assert b'model_name="model"' in metrics.render()[0]


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_a_request_is_observed(metrics, kind):
    params = dataclasses.replace(DELTA, output_kind=kind)
    times = RequestMetrics(10.0, 10.5, 12.0)
    told = {
        RequestOutputKind.DELTA: [1, 3, 1],
        RequestOutputKind.CUMULATIVE: [1, 4, 5],
        RequestOutputKind.FINAL_ONLY: [5],
    }[kind]
    for number in told[:-1]:
        metrics.observe(_output(number, times=times), params)
    times.finished_time_s, times.num_preemptions = 14.0, 1
    metrics.observe(_output(told[-1], finish="length", times=times), params)
    found = _samples(metrics)
    assert found["jpaged:request_success_total", ("finished_reason", "length")] == 1
    assert found["jpaged:time_to_first_token_seconds_sum",] == 2.0
    assert found["jpaged:e2e_request_latency_seconds_sum",] == 4.0
    assert found["jpaged:request_queue_time_seconds_sum",] == 0.5
    assert found["jpaged:request_prefill_time_seconds_sum",] == 1.5
    assert found["jpaged:request_decode_time_seconds_sum",] == 2.0
    assert found["jpaged:request_inference_time_seconds_sum",] == 3.5
    assert found["jpaged:request_generation_tokens_sum",] == 5
    assert found["jpaged:request_prompt_tokens_sum",] == 3
    assert found["jpaged:request_params_max_tokens_sum",] == 7
    assert found["jpaged:request_num_preemptions_sum",] == 1
    assert found["jpaged:request_time_per_output_token_seconds_sum",] == 0.5
    streamed = 0 if kind is RequestOutputKind.FINAL_ONLY else 4
    assert found["jpaged:inter_token_latency_seconds_count",] == streamed
    assert not metrics._open


def test_requests_whose_clients_left_are_not_kept_for_ever(metrics, monkeypatch):
    monkeypatch.setattr("jpaged.serving.metrics._MAX_OPEN", 3)
    for i in range(10):
        output = dataclasses.replace(_output(1, times=RequestMetrics(0.0)), request_id=str(i))
        metrics.observe(output, DELTA)
    assert list(metrics._open) == ["7", "8", "9"]


def test_two_servers_of_one_process_do_not_share(engine):
    first, second = Metrics(engine), Metrics(engine, "other")
    times = RequestMetrics(0.0, 0.0, 0.0, 1.0)
    first.observe(_output(1, finish="stop", times=times), DELTA)
    assert b'finished_reason="stop"' in first.render()[0]
    assert b'finished_reason="stop"' not in second.render()[0]
