"""The outermost layer: ids, the count of open requests, one log line each.

Whatever goes wrong inside gets a plain answer.
"""

import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jpaged.serving.errors import CLIENT_CLOSED_STATUS, ClientDisconnectedError, error_response
from jpaged.serving.logs import request_id
from jpaged.serving.service import REQUEST_ID, REQUEST_ID_HEADER, Service, is_request_id, route_path
from jpaged.serving.tracing import TRACE_HEADERS, trace_headers

logger = logging.getLogger(__name__)

_COUNTED = frozenset({"/v1/completions", "/v1/chat/completions"})


class Gate:
    """ASGI middleware around everything.

    Args:
        app: What it surrounds.
        service: Keeps the count.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID_HEADER, "")
        # One that cannot be shown is refused where it would be used, and never sent back.
        scope[REQUEST_ID] = given if is_request_id(given) else uuid.uuid4().hex
        request_id.set(scope[REQUEST_ID])
        if self._service.tracer is not None:
            trace_headers.set({name: headers[name] for name in TRACE_HEADERS if name in headers})
        is_counted = route_path(scope) in _COUNTED
        self._service.num_open += is_counted
        started_s = time.monotonic()
        status = 0
        wants_id = self._service.settings.enable_request_id_headers

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if wants_id:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = scope[REQUEST_ID]
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except ClientDisconnectedError:
            status = CLIENT_CLOSED_STATUS
        except Exception as error:
            logger.exception("%s %r failed", scope["method"], scope["path"])
            if not status:
                await error_response(error)(scope, receive, send_on)
            status = 500
        finally:
            self._service.num_open -= is_counted
            if self._service.settings.enable_log_requests and is_counted:
                self._log(scope, status, time.monotonic() - started_s)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        logger.info(
            "%s %s %s %d %.3f s",
            scope[REQUEST_ID],
            scope["method"],
            scope["path"],
            status,
            seconds,
        )
