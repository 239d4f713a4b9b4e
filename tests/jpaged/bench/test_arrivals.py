"""Arrival processes have the distribution they are named after."""

import math

import numpy as np
import pytest

from jpaged.bench import arrivals

COUNT, RATE = 20_000, 5.0


def gaps(times):
    return np.diff(times, prepend=0.0)


def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness):
    times = arrivals.arrival_times(COUNT, RATE, burstiness, rng())
    assert times[-1] == pytest.approx(COUNT / RATE)
    between = gaps(times)
    assert between.min() >= 0
    assert between.mean() == pytest.approx(1 / RATE)
    # The coefficient of variation of a gamma distribution is 1 / sqrt(shape); its error over this
    # many samples is below 3 %.
    assert between.std() / between.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.03)


def test_poisson_gaps_are_exponential():
    between = gaps(arrivals.arrival_times(COUNT, RATE, 1.0, rng()))
    for quantile in (0.1, 0.5, 0.9):
        expected = -math.log(1 - quantile) / RATE
        assert np.quantile(between, quantile) == pytest.approx(expected, rel=0.05)


def test_infinite_burstiness_is_a_steady_rate():
    times = arrivals.arrival_times(5, 2.0, math.inf, rng())
    assert times == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5])


def test_infinite_rate_sends_all_at_once():
    assert arrivals.arrival_times(4, math.inf, 1.0, rng()).tolist() == [0.0] * 4


def test_seed_fixes_the_times():
    first, second = (arrivals.arrival_times(9, 1.0, 0.5, rng()).tolist() for _ in range(2))
    assert first == second
    other = arrivals.arrival_times(9, 1.0, 0.5, np.random.default_rng(8))
    assert other.tolist() != first


def test_linear_ramp_goes_from_one_rate_to_the_other():
    times = arrivals.ramp_up_times(3, "linear", 1.0, 4.0, math.inf, rng())
    assert gaps(times) == pytest.approx([1.0, 1 / 2.5, 1 / 4.0])


def test_exponential_ramp_multiplies_the_rate():
    times = arrivals.ramp_up_times(3, "exponential", 1.0, 16.0, math.inf, rng())
    assert gaps(times) == pytest.approx([1.0, 1 / 4.0, 1 / 16.0])


def test_ramp_keeps_its_bursts():
    between = gaps(arrivals.ramp_up_times(COUNT, "linear", 2.0, 2.0, 0.5, rng()))
    assert between.mean() == pytest.approx(0.5, rel=0.03)
    assert between.std() / between.mean() == pytest.approx(math.sqrt(2), rel=0.03)


def test_recorded_times_begin_at_zero_and_stretch_to_a_rate():
    assert arrivals.trace_times([5.0, 6.0, 9.0], math.inf) == pytest.approx([0.0, 1.0, 4.0])
    assert arrivals.trace_times([5.0, 6.0, 9.0], 1.0) == pytest.approx([0.0, 0.5, 2.0])
    assert arrivals.trace_times([5.0], 1.0) == pytest.approx([0.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: arrivals.arrival_times(1, 0, 1, rng()), "request_rate must be above 0, got 0"),
        (lambda: arrivals.arrival_times(1, 1, -1, rng()), "burstiness must be above 0, got -1"),
        (lambda: arrivals.trace_times([1.0], math.nan), "request_rate must be above 0, got nan"),
        (
            lambda: arrivals.ramp_up_times(1, "steep", 1, 2, 1, rng()),
            "ramp_up_strategy must be one of linear, exponential, got 'steep'",
        ),
        (
            lambda: arrivals.ramp_up_times(1, "linear", 0, 2, 1, rng()),
            "ramp_up_start_rps must be above 0, got 0",
        ),
        (
            lambda: arrivals.ramp_up_times(1, "linear", 1, 0, 1, rng()),
            "ramp_up_end_rps must be above 0, got 0",
        ),
        (
            lambda: arrivals.ramp_up_times(1, "linear", 1, 1, 0, rng()),
            "burstiness must be above 0, got 0",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call()
