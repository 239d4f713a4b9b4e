"""The result of a benchmark as a table for people and as JSON with the keys others use."""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from jpaged.bench.answers import Answer
from jpaged.bench.metrics import Summary

_TITLES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (without the first)",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
_WIDTH = 50
_MAX_ERRORS = 5


def table(summary: Summary, metrics: Iterable[str]) -> str:
    """The lines that a person reads."""
    lines = [" Serving benchmark ".center(_WIDTH, "=")]

    def add(label: str, value: float | int | None) -> None:
        if value is not None:
            shown = str(value) if isinstance(value, int) else f"{value:.2f}"
            lines.append(f"{label:<{_WIDTH - 12}}{shown:>12}")

    add("Successful requests", summary.completed)
    add("Failed requests", summary.failed)
    add("Duration (s)", summary.duration_s)
    add("Input tokens", summary.total_input_tokens)
    add("Output tokens", summary.total_output_tokens)
    add("Requests/s", summary.request_throughput)
    add("Goodput (requests/s)", summary.request_goodput)
    add("Output tokens/s", summary.output_throughput)
    add("Peak output tokens/s", summary.max_output_tokens_per_s)
    add("Peak concurrent requests", summary.max_concurrent_requests)
    add("All tokens/s", summary.total_token_throughput)
    add("P99 sent late by (ms)", summary.p99_late_ms)
    for name in metrics:
        values = summary.latencies[name]
        lines.append(f" {_TITLES[name]} ".center(_WIDTH, "-"))
        short = name.upper()
        add(f"Mean {short} (ms)", values.mean)
        add(f"Median {short} (ms)", values.median)
        for percentile, value in values.percentiles.items():
            add(f"P{percentile:g} {short} (ms)", value)
    lines.append("=" * _WIDTH)
    return "\n".join(lines) + "\n"


def error_lines(answers: Sequence[Answer]) -> list[str]:
    """The different errors, those that came most often first, with their number."""
    errors = collections.Counter(answer.error for answer in answers if answer.error is not None)
    lines = [f"{count} x {error}" for error, count in errors.most_common(_MAX_ERRORS)]
    if len(errors) > _MAX_ERRORS:
        lines.append(f"and {len(errors) - _MAX_ERRORS} other errors")
    return lines


def result_dict(summary: Summary) -> dict[str, Any]:
    """The numbers of a summary under the names that `vllm bench serve` writes."""
    result: dict[str, Any] = {
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": summary.request_throughput,
        "request_goodput": summary.request_goodput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "max_output_tokens_per_s": summary.max_output_tokens_per_s,
        "max_concurrent_requests": summary.max_concurrent_requests,
        "p99_late_ms": summary.p99_late_ms,
    }
    for name, values in summary.latencies.items():
        result[f"mean_{name}_ms"] = values.mean
        result[f"median_{name}_ms"] = values.median
        result[f"std_{name}_ms"] = values.std
        for percentile, value in values.percentiles.items():
            result[f"p{percentile:g}_{name}_ms"] = value
    return result


def details(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """Every request's own numbers, in seconds; failed ones have their error."""
    start_s = min((answer.start_s for answer in answers), default=0.0)
    return {
        "input_lens": [answer.prompt_tokens for answer in answers],
        "output_lens": [answer.output_tokens for answer in answers],
        "start_times": [answer.start_s - start_s for answer in answers],
        "ttfts": [answer.ttft_s for answer in answers],
        "itls": [answer.itls_s for answer in answers],
        "latencies": [answer.latency_s for answer in answers],
        "generated_texts": [answer.text for answer in answers],
        "errors": [answer.error or "" for answer in answers],
    }
