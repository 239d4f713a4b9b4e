"""From a request's bytes to a checked body: within limits of size, time and nesting."""

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from jpaged.serving.errors import ApiError, ClientDisconnectedError, bad_request
from jpaged.serving.protocol import REFUSED, Body
from jpaged.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DEPTH = 100
"""Deepest nesting of JSON: beyond it recursive code, ours or a library's, would be at risk."""

INLINE_BYTES = 64 * 1024
"""Larger bodies are read in a thread: megabytes of JSON would hold up everybody's streams."""

BodyT = TypeVar("BodyT", bound=Body)
_CLOSE = {"Connection": "close"}  # what was not read of the body must not become a request


async def read_body(request: Request, kind: type[BodyT], settings: ServerSettings) -> BodyT:
    """The body of a request.

    Raises:
        ApiError: It is too large, too slow, no JSON, or not what this route takes.
        ClientDisconnectedError: The client left before it was complete.
    """
    headers = request.headers
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, "Content-Type must be application/json", code="unsupported_media_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Content-Encoding is not supported", code="unsupported_media_type")
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            raw = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        raise ApiError(
            408, "the body did not come in time", code="request_timeout", headers=_CLOSE
        ) from None
    except ClientDisconnect:
        raise ClientDisconnectedError from None
    if len(raw) <= INLINE_BYTES:
        return validate(kind, decode_json(raw))
    return await asyncio.to_thread(lambda: validate(kind, decode_json(raw)))


def decode_json(raw: bytes) -> Any:
    """JSON as plain data.

    Raises:
        ApiError: It is no JSON, or nested too deeply.
    """
    try:
        data = msgspec.json.decode(raw)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not JSON: {error}", code="invalid_json") from None
    # Only a body with that many brackets can be that deep, and few have so many.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(data)
    return data


def validate(kind: type[BodyT], data: Any) -> BodyT:
    """Plain data as a body.

    Raises:
        ApiError: A field is unknown or of the wrong type; names it.
    """
    if not isinstance(data, dict):
        raise bad_request("the body must be a JSON object")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error, kind, data) from None


async def _read(request: Request, limit: int) -> bytes:
    given = request.headers.get("content-length", "")
    if given.isdecimal() and int(given) > limit:
        raise _too_large(limit)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    text = f"the body must be at most {limit} bytes"
    return ApiError(413, text, code="body_too_large", headers=_CLOSE)


def _too_deep() -> ApiError:
    return bad_request(f"the body must be nested at most {MAX_DEPTH} levels", code="invalid_json")


def _check_depth(data: Any) -> None:
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        level = [
            child
            for container in level
            for child in (container.values() if type(container) is dict else container)
            if type(child) is dict or type(child) is list
        ]


def _explain(error: ValidationError, kind: type[Body], data: dict[str, Any]) -> ApiError:
    """One line about the innermost thing that is wrong."""
    found: dict[str, list[Any]] = {}
    for entry in error.errors(include_url=False):
        found.setdefault(_path(entry, data), []).append(entry)
    unknown = next((path for path in found if path not in kind.model_fields and path in data), None)
    # Of the alternatives that a field may be, the one that fits best fails furthest inside.
    path = unknown or max(found, key=lambda path: path.count(".") + path.count("["))
    entries = found[path]
    name = path.rpartition(".")[2]
    match entries[0]["type"]:
        case "extra_forbidden":
            reason = REFUSED.get(name, "there is no such field")
            return bad_request(f"{path} is not supported: {reason}", path, "unsupported_field")
        case "missing":
            return bad_request(f"{path} is required", path, "missing_field")
        case "value_error":
            return bad_request(f"{path} {entries[0]['ctx']['error']}", path, "invalid_value")
    rules = [entry["msg"].replace("Input should be ", "") for entry in entries]
    got = repr(entries[0]["input"])
    got = got if len(got) <= 60 else got[:57] + "..."
    expected = " or ".join(dict.fromkeys(rules))
    return bad_request(f"{path} must be {expected}, got {got}", path, "invalid_type")


def _path(entry: Any, data: Any) -> str:
    """Where an error is, without pydantic's names for the alternatives of a union."""
    path, here = "", data
    steps: Sequence[str | int] = entry["loc"]
    for place, step in enumerate(steps):
        is_absent = place == len(steps) - 1 and entry["type"] == "missing"
        if isinstance(here, dict) and (step in here or is_absent):
            path += f".{step}" if path else str(step)
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int):
            path += f"[{step}]"
            here = here[step]
    return path or "body"
