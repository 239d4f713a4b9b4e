"""API keys: everything but the health checks needs one, if the server has any."""

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jpaged.serving.errors import ApiError, error_response
from jpaged.serving.service import route_path

OPEN_PATHS = frozenset({"/health", "/ping"})
"""What a load balancer asks without a key."""


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
        error = ApiError(
            401,
            "a valid API key is required: Authorization: Bearer KEY",
            type="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _valid(self, values: list[str]) -> bytes | None:
        if len(values) != 1:
            return None
        scheme, _, key = values[0].partition(" ")
        if scheme.lower() != "bearer":
            return None
        given, found = _digest(key.strip()), None
        # All are compared, and digests are equally long: the time tells nothing of the keys.
        for digest in self._digests:
            if hmac.compare_digest(digest, given):
                found = digest
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
