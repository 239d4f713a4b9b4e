"""The OpenAPI document: bodies from their pydantic models, answers from their structs."""

from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from jpaged.serving import answers
from jpaged.serving.errors import ErrorEnvelope
from jpaged.serving.protocol import Body, CompletionRequest
from jpaged.serving.protocol_chat import (
    ChatCompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

_REF = "#/components/schemas/{}"
_BODIES: tuple[type[Body], ...] = (
    CompletionRequest,
    ChatCompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
)
_ANSWERS = (
    answers.Completion,
    answers.ChatCompletion,
    answers.ModelCard,
    answers.ModelList,
    answers.Tokenization,
    answers.Detokenization,
    answers.Version,
    answers.Load,
    ErrorEnvelope,
)
_ERRORS = {
    400: "The request is wrong; `error.param` names the field",
    401: "No valid API key",
    404: "There is no such path or model",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is not JSON by its Content-Type",
    500: "The server failed",
    503: "Too much waits already, or the engine has ended",
}
_BODY_ERRORS = (408, 413, 415)


def components() -> dict[str, Any]:
    """The schemas of all bodies and answers by name."""
    _, bodies = models_json_schema(
        [(body, "validation") for body in _BODIES], ref_template=_REF.format("{model}")
    )
    _, structs = msgspec.json.schema_components(_ANSWERS, ref_template=_REF.format("{name}"))
    # Both have parts of the same names (FunctionCall): those of answers are renamed.
    return bodies["$defs"] | {_answer_name(k): _renamed(v) for k, v in structs.items()}


def operation(
    *,
    body: type[Body] | None = None,
    answer: type[Any] | None = None,
    media_type: str | None = None,
    streams: bool = False,
    errors: tuple[int, ...] = (),
) -> dict[str, Any]:
    """What FastAPI is to say of a route.

    Args:
        body: What it takes.
        answer: What it gives, if that is JSON of ours.
        media_type: What it gives otherwise.
        streams: Whether it may answer with events too.
        errors: Statuses that it answers with, besides those that every route does.
    """
    content: dict[str, Any] = {}
    if answer is not None:
        content["application/json"] = {"schema": _ref(_answer_name(answer.__name__))}
    if media_type is not None:
        content[media_type] = {"schema": {"type": "object" if "json" in media_type else "string"}}
    if streams:
        content["text/event-stream"] = {}  # events; each has a chunk of the answer as JSON
    statuses = {401, 500, *errors} | ({400, 404, *_BODY_ERRORS, 503} if body is not None else set())
    error = {"application/json": {"schema": _ref(_answer_name("ErrorEnvelope"))}}
    responses = {
        status: {"description": _ERRORS[status], "content": error} for status in sorted(statuses)
    }
    options: dict[str, Any] = {
        "responses": {200: {"description": "Well", "content": content}, **responses}
    }
    if body is not None:
        schema = {"application/json": {"schema": _ref(body.__name__)}}
        options["openapi_extra"] = {"requestBody": {"required": True, "content": schema}}
    return options


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name)}


def _answer_name(name: str) -> str:
    return f"{name}Answer"


def _renamed(schema: Any) -> Any:
    """The schema with its references renamed as its parts are."""
    if isinstance(schema, dict):
        return {
            key: _answer_name(value) if key == "$ref" else _renamed(value)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_renamed(part) for part in schema]
    return schema
