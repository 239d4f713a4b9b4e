"""What the options of `jpaged bench serve` mean, and which of them do not go together."""

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from jpaged.bench import metrics


def check(args: argparse.Namespace) -> None:
    """Refuses numbers out of range and options that exclude each other.

    Raises:
        ValueError: With what is wrong.
    """
    for name in ("num_prompts", "max_concurrency"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in ("num_warmups", "ready_check_timeout_sec"):
        if getattr(args, name) < 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(args, name)}")
    if args.dataset_name != "random" and args.dataset_path is None:
        raise ValueError(f"--dataset-name {args.dataset_name} needs --dataset-path")
    if args.dataset_name == "random" and args.dataset_path is not None:
        raise ValueError("--dataset-path needs --dataset-name custom, sharegpt or trace")
    bounds = (args.ramp_up_start_rps, args.ramp_up_end_rps)
    if args.ramp_up_strategy is None:
        if bounds != (None, None):
            raise ValueError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy")
    elif None in bounds:
        raise ValueError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
    elif args.request_rate != math.inf:
        raise ValueError("--ramp-up-strategy sets the rate: leave --request-rate out")
    elif args.dataset_name == "trace":
        raise ValueError("--ramp-up-strategy and the arrival times of a trace exclude each other")


def percentiles(text: str) -> list[float]:
    """The numbers of a list as 50,90,99.

    Raises:
        ValueError: It is no such list, or one is not in [0, 100].
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"metric_percentiles must be like 50,90,99, got {text!r}") from None
    if not all(0 <= value <= 100 for value in values):
        raise ValueError(f"metric_percentiles must be in [0, 100], got {text!r}")
    return values


def metric_names(text: str) -> list[str]:
    """The names of a list as ttft,itl.

    Raises:
        ValueError: A metric is unknown.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in metrics.METRICS:
            raise ValueError(
                f"percentile_metrics must be of {', '.join(metrics.METRICS)}, got {name!r}"
            )
    return names


def goodput(parts: Sequence[str]) -> dict[str, float]:
    """Objectives in milliseconds by metric, from parts as ttft:200.

    Raises:
        ValueError: A part is no objective.
    """
    objectives = {}
    for part in parts:
        name, _, value = part.partition(":")
        if name not in metrics.GOODPUT_METRICS:
            allowed = ", ".join(metrics.GOODPUT_METRICS)
            raise ValueError(f"goodput must name one of {allowed}, got {part!r}")
        try:
            objectives[name] = float(value)
        except ValueError:
            raise ValueError(f"goodput must be like ttft:200 (in ms), got {part!r}") from None
        if objectives[name] <= 0:
            raise ValueError(f"goodput must be above 0 ms, got {part!r}")
    return objectives


def fields(args: argparse.Namespace) -> dict[str, Any]:
    """What each request's body has besides the prompt.

    Raises:
        ValueError: `--extra-body` is no JSON object.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "logprobs")
    found = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.ignore_eos:
        found["ignore_eos"] = True
    if args.extra_body is not None:
        try:
            extra = json.loads(args.extra_body)
        except ValueError as error:
            raise ValueError(f"extra_body must be JSON: {error}") from None
        if not isinstance(extra, dict):
            raise ValueError(f"extra_body must be a JSON object, got {args.extra_body!r}")
        found |= extra
    return found


def pairs(option: str, parts: Sequence[str] | None) -> dict[str, str]:
    """What an option's parts of the form NAME=VALUE say.

    Raises:
        ValueError: A part has another form.
    """
    found = {}
    for part in parts or ():
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{option} must be like NAME=VALUE, got {part!r}")
        found[name] = value
    return found


def url(host: str, port: int) -> str:
    """The base URL of a server at this address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
