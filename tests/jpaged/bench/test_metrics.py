"""Statistics against numbers worked out by hand."""

import pytest

from jpaged.bench import report
from jpaged.bench.answers import Answer
from jpaged.bench.metrics import summarize

ANSWERS = [
    # Three tokens in three pieces: 100 ms, then gaps of 50 and 150 ms.
    Answer(10, 3, 100.0, 0.0, 0.1, [0.05, 0.15], 0.3, "a b c"),
    # Five tokens in two pieces.
    Answer(20, 5, 100.2, 0.004, 0.2, [0.2], 0.4, "d e"),
    # One token: it has no time per further token.
    Answer(30, 1, 101.0, 0.0, 0.5, [], 0.5, "f"),
    Answer(40, 0, 100.1, 0.0, latency_s=1.0, error="HTTP 503: full"),
]


@pytest.fixture
def summary():
    goodput = {"ttft": 300.0, "tpot": 60.0}
    return summarize(ANSWERS, 2.0, percentiles=[50, 90], goodput=goodput)


def test_counts_and_rates(summary):
    assert (summary.completed, summary.failed) == (3, 1)
    assert (summary.total_input_tokens, summary.total_output_tokens) == (60, 9)
    assert summary.request_throughput == 1.5
    assert summary.output_throughput == 4.5
    assert summary.total_token_throughput == 34.5


@pytest.mark.parametrize(
    ("metric", "mean", "median", "p90"),
    [
        # 100, 200, 500: the 90th percentile lies 0.8 of the way from the second to the third.
        ("ttft", 800 / 3, 200, 440),
        # (300 - 100) / 2 = 100 and (400 - 200) / 4 = 50.
        ("tpot", 75, 75, 95),
        # 50, 150, 200.
        ("itl", 400 / 3, 150, 190),
        ("e2el", 400, 400, 480),
    ],
)
def test_latencies(summary, metric, mean, median, p90):
    got = summary.latencies[metric]
    assert got.mean == pytest.approx(mean)
    assert got.median == pytest.approx(median)
    assert got.percentiles == pytest.approx({50: median, 90: p90})


def test_standard_deviation(summary):
    assert summary.latencies["tpot"].std == pytest.approx(25)


def test_goodput_counts_requests_that_meet_every_objective(summary):
    # The first misses 60 ms a token, the third 300 ms to the first one.
    assert summary.request_goodput == 0.5
    assert summarize(ANSWERS, 2.0).request_goodput is None
    assert summarize(ANSWERS, 2.0, goodput={"e2el": 400.0}).request_goodput == 1.0


def test_peaks(summary):
    # Open from 100.0 to 100.3, 100.2 to 100.6, 101.0 to 101.5, and 100.1 to 101.1 (the failed one).
    assert summary.max_concurrent_requests == 3
    # Pieces at 100.1, .15, .3, .4, .6 and 101.5.
    assert summary.max_output_tokens_per_s == 5


def test_request_that_begins_as_another_ends_is_not_open_with_it():
    answers = [Answer(1, 1, 0.0, latency_s=1.0), Answer(1, 1, 1.0, latency_s=1.0)]
    assert summarize(answers, 2.0).max_concurrent_requests == 1


def test_lateness_is_of_all_requests(summary):
    # 99th percentile of 0, 0, 0, 4 ms.
    assert summary.p99_late_ms == pytest.approx(3.88)


def test_nothing_that_went_well_is_zeros():
    got = summarize(ANSWERS[3:], 2.0)
    assert (got.completed, got.failed, got.output_throughput) == (0, 1, 0.0)
    assert got.latencies["ttft"].mean == 0.0


def test_keys_are_those_of_vllm(summary):
    result = report.result_dict(summary)
    assert result["p90_ttft_ms"] == pytest.approx(440)
    expected = {"duration", "completed", "total_input_tokens", "request_throughput"}
    expected |= {"mean_ttft_ms", "median_tpot_ms", "std_itl_ms", "p50_e2el_ms", "request_goodput"}
    assert expected <= result.keys()
    assert "p99.9_itl_ms" in report.result_dict(summarize(ANSWERS, 1.0, percentiles=[99.9]))


def test_details_have_one_entry_a_request():
    details = report.details(ANSWERS)
    assert {len(values) for values in details.values()} == {4}
    assert details["start_times"] == pytest.approx([0.0, 0.2, 1.0, 0.1])
    assert details["errors"] == ["", "", "", "HTTP 503: full"]


def test_table_names_every_number(summary):
    text = report.table(summary, ["ttft", "e2el"])
    assert "Failed requests" in text
    assert "P90 TTFT (ms)" in text
    assert "440.00" in text
    assert "ITL" not in text
    assert len(set(map(len, text.splitlines()))) == 1


def test_errors_are_counted():
    answers = [Answer(error=f"error {n}") for n in range(7) for _ in range(n + 1)]
    lines = report.error_lines(answers)
    assert lines[0] == "7 x error 6"
    assert lines[-1] == "and 2 other errors"
    assert len(lines) == 6
