"""Answers as HTTP responses."""

from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from jpaged.serving.answers import PromptTokensDetails, Usage, encode
from jpaged.serving.errors import bad_request
from jpaged.serving.protocol import GenerationBody
from jpaged.serving.service import Service
from jpaged.serving.settings import ServerSettings
from jpaged.serving.streaming import EventStream


def json_response(answer: Any) -> Response:
    """An answer as JSON."""
    return Response(encode(answer), media_type="application/json")


def stream_response(service: Service, events: AsyncGenerator[bytes, None]) -> EventStream:
    """Events as they come."""
    return EventStream(
        events,
        keep_alive_s=service.settings.sse_keep_alive_interval_s,
        write_timeout_s=service.settings.write_timeout_s,
    )


def usage_of(num_prompt: int, num_completion: int, num_cached: int) -> Usage:
    """Tokens of a request."""
    return Usage(
        num_prompt, num_prompt + num_completion, num_completion, PromptTokensDetails(num_cached)
    )


def usage_wishes(body: GenerationBody, settings: ServerSettings) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether each chunk tells it."""
    options = body.stream_options
    at_end = settings.enable_force_include_usage
    if options is not None and options.include_usage is not None:
        at_end = options.include_usage
    each = options is not None and bool(options.continuous_usage_stats)
    if each and not at_end:
        raise bad_request(
            "stream_options.continuous_usage_stats needs include_usage=true",
            "stream_options.continuous_usage_stats",
        )
    return at_end, each
