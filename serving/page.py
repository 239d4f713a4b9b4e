"""The page at `/`: a chat, and a live picture of the block pool; plain files, nothing from outside.

What it shows comes from `/v1/models`, `/v1/chat/completions` and `/pool`. A server with keys wants
one for the files, too: a browser asks a person for it, and sends it with all that the page loads.
"""

import hashlib
import html
import importlib.resources
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jpaged.serving.settings import ServerSettings

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'self'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def mount_page(app: Any, settings: ServerSettings) -> None:
    """Adds the routes of the page to a Starlette or FastAPI application."""
    folder = importlib.resources.files("jpaged.serving") / "static"
    for file in folder.iterdir():
        suffix = "." + file.name.rpartition(".")[2]
        if suffix not in _TYPES:
            continue
        content = file.read_bytes()
        path = f"/static/{file.name}"
        if file.name == "index.html":
            root = html.escape(settings.root_path.rstrip("/"))
            content, path = content.replace(b"{{ROOT}}", root.encode()), "/"
        app.router.routes.append(
            Route(path, _sender(content, _TYPES[suffix]), include_in_schema=False)
        )


def _sender(content: bytes, content_type: str) -> Callable[[Request], Awaitable[Response]]:
    """A handler that sends these bytes, or only tells that they are as before."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "ETag": tag,
        # Always asked for anew, so that a page never runs with the scripts of another version.
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
    }

    async def send(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=content_type, headers=headers)

    return send
