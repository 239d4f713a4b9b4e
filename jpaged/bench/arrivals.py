"""When requests are sent: at once, at a rate (steady, Poisson or in bursts), or a growing one."""

import math
from collections.abc import Sequence

import numpy as np

RAMP_UPS = ("linear", "exponential")


def arrival_times(
    count: int, rate: float, burstiness: float, rng: np.random.Generator
) -> np.ndarray:
    """Seconds from the start at which each request is sent.

    The gaps are gamma distributed with mean 1 / `rate`; they are then scaled so that the last
    request is sent after exactly `count / rate` seconds.

    Args:
        count: How many requests.
        rate: Requests a second; infinite sends all at once.
        burstiness: Shape of the distribution: 1 is a Poisson process, less comes in bursts, more is
            steadier.
        rng: Where the draws come from.

    Raises:
        ValueError: `rate` or `burstiness` is not above 0.
    """
    _check("request_rate", rate)
    _check("burstiness", burstiness)
    if math.isinf(rate):
        return np.zeros(count)
    times = np.cumsum(_gaps(np.full(count, rate), burstiness, rng))
    return times * (count / rate / times[-1])


def ramp_up_times(
    count: int,
    strategy: str,
    start_rps: float,
    end_rps: float,
    burstiness: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """The same with a rate that goes from `start_rps` to `end_rps` over the requests.

    Raises:
        ValueError: The strategy is unknown, or a number is not above 0.
    """
    if strategy not in RAMP_UPS:
        raise ValueError(f"ramp_up_strategy must be one of {', '.join(RAMP_UPS)}, got {strategy!r}")
    _check("ramp_up_start_rps", start_rps)
    _check("ramp_up_end_rps", end_rps)
    _check("burstiness", burstiness)
    progress = np.arange(count) / max(count - 1, 1)
    if strategy == "linear":
        rates = start_rps + (end_rps - start_rps) * progress
    else:
        rates = start_rps * (end_rps / start_rps) ** progress
    return np.cumsum(_gaps(rates, burstiness, rng))


def trace_times(recorded: Sequence[float], rate: float) -> np.ndarray:
    """Recorded times from the first one on, stretched to a mean rate unless that is infinite."""
    _check("request_rate", rate)
    times = np.asarray(recorded, float) - recorded[0]
    if math.isinf(rate) or times[-1] == 0:
        return times
    return times * ((len(times) - 1) / rate / times[-1])


def _gaps(rates: np.ndarray, burstiness: float, rng: np.random.Generator) -> np.ndarray:
    if math.isinf(burstiness):
        return 1 / rates
    return rng.gamma(burstiness, 1 / (rates * burstiness))


def _check(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")
