"""Routes about the server itself: models, health, version, load, metrics, the block pool."""

import asyncio
import math
import time

from starlette.requests import Request
from starlette.responses import Response

import jpaged
from jpaged.serving.answers import Load, ModelCard, ModelList, Version
from jpaged.serving.engine import EngineDeadError
from jpaged.serving.errors import ApiError
from jpaged.serving.responses import json_response
from jpaged.serving.service import Service

POOL_MAX_AGE_S = 0.2
"""A look at a large pool holds the engine up; however many people watch, it is asked this often."""


class System:
    """The handlers of these routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._looking = asyncio.Lock()
        self._pool: bytes | memoryview = b""
        self._seen_s = -math.inf

    async def models(self, request: Request) -> Response:
        """The model, by every name it may be called."""
        return json_response(ModelList([self._card(name) for name in self._service.model_names]))

    async def model(self, request: Request) -> Response:
        """The model, if it has that name."""
        return json_response(self._card(self._service.model_name(request.path_params["model"])))

    async def health(self, request: Request) -> Response:
        """An empty answer as long as the engine runs."""
        try:
            await self._service.engine.check_health()
        except EngineDeadError:
            raise ApiError(
                503, "the engine has ended", type="server_error", code="engine_dead"
            ) from None
        return Response()

    async def version(self, request: Request) -> Response:
        """The version of jpaged."""
        return json_response(Version(jpaged.__version__))

    async def load(self, request: Request) -> Response:
        """How many requests for text are open."""
        return json_response(Load(self._service.num_open))

    async def metrics(self, request: Request) -> Response:
        """Metrics in the text format of Prometheus."""
        await self._service.metrics.refresh()
        body, content_type = self._service.metrics.render()
        return Response(body, headers={"Content-Type": content_type})

    async def pool(self, request: Request) -> Response:
        """What every block of the pool is used for; one look at it serves all who ask meanwhile."""
        async with self._looking:
            if time.monotonic() - self._seen_s > POOL_MAX_AGE_S:
                self._pool = json_response(await self._service.engine.pool_view()).body
                self._seen_s = time.monotonic()
        return Response(self._pool, media_type="application/json")

    def _card(self, name: str) -> ModelCard:
        service = self._service
        return ModelCard(
            name, service.started, service.model_names[0], service.engine.info.max_model_len
        )
