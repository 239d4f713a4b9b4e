"""Routes about the server itself: models, health, version, load, metrics, the block pool."""

from starlette.requests import Request
from starlette.responses import Response

import jpaged
from jpaged.serving.answers import Load, ModelCard, ModelList, Version
from jpaged.serving.engine import EngineDeadError
from jpaged.serving.errors import ApiError
from jpaged.serving.responses import json_response
from jpaged.serving.service import Service


class System:
    """The handlers of these routes."""

    def __init__(self, service: Service) -> None:
        self._service = service

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
        """What every block of the pool is used for."""
        view = await self._service.engine.pool_view()
        return json_response(view)

    def _card(self, name: str) -> ModelCard:
        service = self._service
        return ModelCard(
            name, service.started, service.model_names[0], service.engine.info.max_model_len
        )
