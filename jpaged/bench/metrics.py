"""Statistics over the answers of a benchmark."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jpaged.bench.answers import Answer

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclasses.dataclass(frozen=True, slots=True)
class Distribution:
    """Milliseconds of one metric; all 0 if there is no sample.

    Attributes:
        mean: Their mean.
        median: Their median.
        std: Their standard deviation.
        percentiles: Percentile to value, interpolated linearly.
    """

    mean: float
    median: float
    std: float
    percentiles: Mapping[float, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What a benchmark found; rates are per second of its whole duration.

    Attributes:
        duration_s: From the start to the end of the last answer.
        completed: Requests that went well; all that follows is about those.
        failed: Requests that did not.
        total_input_tokens: Tokens of prompts.
        total_output_tokens: Tokens of answers.
        request_throughput: Requests a second.
        request_goodput: Requests a second that met every objective; None if there are none.
        output_throughput: Tokens of answers a second.
        total_token_throughput: Tokens of prompts and answers a second.
        max_output_tokens_per_s: Most pieces of answers that came in one second of the clock.
        max_concurrent_requests: Most requests, failed ones too, that were open at one time.
        p99_late_ms: 99th percentile of how late requests were sent.
        latencies: By metric: ttft, tpot, itl, e2el.
    """

    duration_s: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    p99_late_ms: float
    latencies: Mapping[str, Distribution]


def summarize(
    answers: Sequence[Answer],
    duration_s: float,
    *,
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
) -> Summary:
    """The statistics of some answers.

    Args:
        answers: Of all requests.
        duration_s: How long the whole took.
        percentiles: Those to compute.
        goodput: Objectives in milliseconds by metric; a request is good that meets all.
    """
    good = [answer for answer in answers if answer.error is None]
    num_input = sum(answer.prompt_tokens for answer in good)
    num_output = sum(answer.output_tokens for answer in good)
    late = [answer.late_s for answer in answers]
    num_met = sum(_meets(answer, goodput or {}) for answer in good)
    return Summary(
        duration_s=duration_s,
        completed=len(good),
        failed=len(answers) - len(good),
        total_input_tokens=num_input,
        total_output_tokens=num_output,
        request_throughput=len(good) / duration_s,
        request_goodput=num_met / duration_s if goodput else None,
        output_throughput=num_output / duration_s,
        total_token_throughput=(num_input + num_output) / duration_s,
        max_output_tokens_per_s=_most_pieces_in_a_second(good),
        max_concurrent_requests=_most_open(answers),
        p99_late_ms=1000 * float(np.percentile(late, 99)) if late else 0.0,
        latencies={
            name: _distribution(values, percentiles) for name, values in _samples(good).items()
        },
    )


def _samples(good: Sequence[Answer]) -> dict[str, list[float]]:
    """Seconds by metric."""
    return {
        "ttft": [answer.ttft_s for answer in good],
        "tpot": [answer.tpot_s for answer in good if answer.output_tokens > 1],
        "itl": [gap for answer in good for gap in answer.itls_s],
        "e2el": [answer.latency_s for answer in good],
    }


def _distribution(seconds: Sequence[float], percentiles: Sequence[float]) -> Distribution:
    values = 1000 * np.asarray(seconds or [0.0])
    points = np.percentile(values, percentiles).tolist()
    return Distribution(
        mean=float(values.mean()),
        median=float(np.median(values)),
        std=float(values.std()),
        percentiles=dict(zip(percentiles, points, strict=True)),
    )


def _meets(answer: Answer, goodput: Mapping[str, float]) -> bool:
    got = {
        "ttft": answer.ttft_s,
        "tpot": answer.tpot_s if answer.output_tokens > 1 else 0.0,
        "e2el": answer.latency_s,
    }
    return all(1000 * got[name] <= limit for name, limit in goodput.items())


def _most_pieces_in_a_second(answers: Sequence[Answer]) -> float:
    if not answers:
        return 0.0
    times = np.concatenate(
        [np.cumsum([answer.start_s + answer.ttft_s, *answer.itls_s]) for answer in answers]
    )
    return float(np.bincount((times - min(a.start_s for a in answers)).astype(int)).max())


def _most_open(answers: Sequence[Answer]) -> int:
    starts = [(answer.start_s, 1) for answer in answers]
    ends = [(answer.start_s + answer.latency_s, -1) for answer in answers]
    most = now = 0
    for _, change in sorted(starts + ends):  # where times are equal, ends come first
        now += change
        most = max(most, now)
    return most
