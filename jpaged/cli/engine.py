"""From parsed arguments to the engine and its sampling parameters.

Commands call `engine.make_llm` through this module, so that a test can put another engine there.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jpaged.cli.parser import ENGINE_PREFIX, SAMPLING_PREFIX
from jpaged.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jpaged.llm import LLM

LONE_REQUEST: dict[str, Any] = {"compilation": "lazy"}
"""Options for one request at a time: compiling programs it does not need would slow it down."""


def make_llm(options: Mapping[str, Any]) -> "LLM":
    """The engine with these options; the first place where JAX is imported."""
    from jpaged.llm import LLM

    return LLM(**options)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given on the command line."""
    return _given(args, ENGINE_PREFIX)


def sampling_options(args: argparse.Namespace, **defaults: object) -> dict[str, Any]:
    """The sampling options that were given on the command line, over the command's `defaults`."""
    return defaults | _given(args, SAMPLING_PREFIX)


def sampling_params(options: Mapping[str, Any], *, delta: bool) -> SamplingParams:
    """Checked sampling parameters; those of beam search are greedy unless they say otherwise.

    Args:
        options: Fields of `SamplingParams` by name.
        delta: Whether each output carries only what is new, or all at the end; beam search has
            nothing to tell before.

    Raises:
        ValueError: A field does not exist here, or its value is not allowed.
    """
    known = {field.name for field in dataclasses.fields(SamplingParams)} - {"output_kind"}
    if unknown := sorted(options.keys() - known):
        raise ValueError(
            f"unknown field {unknown[0]!r}; sampling fields: {', '.join(sorted(known))}"
        )
    if options.get("use_beam_search") is True:
        delta, options = False, {"temperature": 0.0, **options}
    kind = RequestOutputKind.DELTA if delta else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**options, output_kind=kind)


def _given(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in vars(args).items()
        if name.startswith(prefix) and value is not None
    }
