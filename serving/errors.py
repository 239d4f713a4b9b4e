"""What a client is told when something goes wrong: one table from exception to answer.

Every error is OpenAI's envelope `{"error": {message, type, param, code}}`. Nothing of the inside
(tracebacks, paths, texts of unexpected exceptions) gets into it.
"""

import http
import re

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jpaged.serving.engine import EngineDeadError, QueueFullError

MAX_MESSAGE_CHARS = 500
"""Longer messages are cut: what a client sent must not come back to it by the megabyte."""
CLIENT_CLOSED_STATUS = 499
"""Of requests whose client has gone; nobody receives it, logs and metrics show it."""

_FIELD = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*) (?:must|needs|does not|is not|cannot)\b")


class ErrorBody(msgspec.Struct):
    """What went wrong.

    Attributes:
        message: One line for people.
        type: The kind of error.
        param: The field of the request that is to blame, if one is.
        code: A name of the error for programs, if it has one.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct):
    """An answer that says what went wrong."""

    error: ErrorBody


class ApiError(Exception):
    """An answer with an error status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = ErrorBody(_shown(message), type, param, code)


class ClientDisconnectedError(Exception):
    """The client has gone; there is nobody to answer."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A mistake of the client."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException) -> ApiError:
    """The answer for any exception: the one table."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(
                503,
                str(error),
                type="overloaded_error",
                code="queue_full",
                headers={"Retry-After": str(max(error.retry_after_s, 1))},
            )
        case EngineDeadError():
            return ApiError(500, "the engine has ended", type="server_error", code="engine_dead")
        case ClientDisconnectedError():
            return ApiError(CLIENT_CLOSED_STATUS, "the client has gone", code="client_closed")
        case HTTPException():
            return _of_status(error)
        case ValueError() if not isinstance(error, UnicodeError):
            field = _FIELD.match(str(error))
            return bad_request(str(error), param=field[1] if field else None)
        case _:
            return ApiError(500, "internal server error", type="server_error")


def error_response(error: BaseException) -> Response:
    """`as_api_error` as a response."""
    answer = as_api_error(error)
    return Response(
        encode_error(answer),
        status_code=answer.status,
        headers=answer.headers,
        media_type="application/json",
    )


def encode_error(error: ApiError) -> bytes:
    """The envelope as JSON."""
    return msgspec.json.encode(ErrorEnvelope(error.body))


def _of_status(error: HTTPException) -> ApiError:
    kind = {401: "authentication_error", 404: "not_found_error"}.get(
        error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error"
    )
    try:
        phrase = http.HTTPStatus(error.status_code).phrase
    except ValueError:
        phrase = "error"
    message = error.detail or phrase
    return ApiError(error.status_code, message, type=kind, headers=dict(error.headers or {}))


def _shown(message: str) -> str:
    """One line of Unicode text, not too long."""
    line = " ".join(message.split())
    if len(line) > MAX_MESSAGE_CHARS:
        line = line[: MAX_MESSAGE_CHARS - 1] + "…"
    return line.encode(errors="replace").decode()
