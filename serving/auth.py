"""API keys: everything but the health checks needs one, if the server has any.

A key comes as bearer token, or as the password of basic authentication: that is what a browser
asks for when it opens the page at `/`, and then sends with all that the page loads.
"""

import base64
import binascii
import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jpaged.serving.errors import ApiError, error_response
from jpaged.serving.service import route_path

OPEN_PATHS = frozenset({"/health", "/ping"})
"""What a load balancer asks without a key."""
_ASK_PERSON = 'Basic realm="jpaged: any name, an API key as password", charset="UTF-8"'


class Authentication:
    """ASGI middleware that answers 401 to requests without a valid key.

    Args:
        app: What it protects.
        keys: Any of them opens it.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = tuple(_digest(key) for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what has a key."""
        if scope["type"] == "lifespan" or route_path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        digest = self._valid(Headers(scope=scope).getlist("authorization"))
        if digest is not None:
            # Tells apart whose request it is, without the key going further.
            scope["jpaged.key"] = digest.hex()[:16]
            await self._app(scope, receive, send)
            return
        is_page = route_path(scope) == "/" or route_path(scope).startswith("/static/")
        error = ApiError(
            401,
            "a valid API key is required: Authorization: Bearer KEY",
            type="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": _ASK_PERSON if is_page else "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _valid(self, values: list[str]) -> bytes | None:
        if len(values) != 1:
            return None
        key = _key_of(values[0])
        if key is None:
            return None
        given, found = _digest(key), None
        # All are compared, and digests are equally long: the time tells nothing of the keys.
        for digest in self._digests:
            if hmac.compare_digest(digest, given):
                found = digest
        return found


def _key_of(authorization: str) -> str | None:
    """The key in the value of an Authorization header."""
    scheme, _, value = authorization.partition(" ")
    match scheme.lower():
        case "bearer":
            return value.strip()
        case "basic":
            try:
                pair = base64.b64decode(value.strip(), validate=True).decode()
            except (binascii.Error, UnicodeError, ValueError):
                return None
            return pair.partition(":")[2]
        case _:
            return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
