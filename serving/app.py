"""The HTTP application: routes, and the layers around them. No state but what it is given."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import jpaged
from jpaged.serving import answers
from jpaged.serving.auth import Authentication
from jpaged.serving.chat import Chat
from jpaged.serving.completions import Completions
from jpaged.serving.engine import EngineClient, EngineDeadError, QueueFullError
from jpaged.serving.errors import ApiError, error_response
from jpaged.serving.gate import Gate
from jpaged.serving.openapi import components, operation
from jpaged.serving.page import mount_page
from jpaged.serving.protocol import CompletionRequest
from jpaged.serving.protocol_chat import (
    ChatCompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from jpaged.serving.service import REQUEST_ID_HEADER, Service
from jpaged.serving.settings import ServerSettings
from jpaged.serving.streaming import logged
from jpaged.serving.system import System
from jpaged.serving.tokenize import Tokenize
from jpaged.serving.tool_parsers import get_tool_parser

Handler = Callable[[Request], Awaitable[Response]]


def create_app(engine: EngineClient, settings: ServerSettings) -> FastAPI:
    """The application that serves an engine.

    Raises:
        ValueError: A setting names what does not exist.
    """
    if settings.tool_call_parser is not None:
        get_tool_parser(settings.tool_call_parser)
    service = Service(engine, settings)
    with_docs = not settings.disable_fastapi_docs
    app = FastAPI(
        title="jpaged",
        version=jpaged.__version__,
        description="OpenAI's API, and vLLM's additions to it.",
        openapi_url="/openapi.json" if with_docs else None,
        docs_url="/docs" if with_docs else None,
        redoc_url="/redoc" if with_docs else None,
        redirect_slashes=False,
    )
    app.state.service = service
    _add_routes(app, service)
    mount_page(app, settings)
    _add_errors(app)
    _add_layers(app, service)
    app.openapi = lambda: _document(app)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    def add(path: str, handler: Handler, *methods: str, **options: Any) -> None:
        app.add_api_route(
            path,
            handler,
            methods=list(methods),
            response_class=Response,
            response_model=None,
            **operation(**options),
        )

    system, tokenize = System(service), Tokenize(service)
    completion = {"body": CompletionRequest, "answer": answers.Completion, "streams": True}
    chat = {"body": ChatCompletionRequest, "answer": answers.ChatCompletion, "streams": True}
    add("/v1/completions", Completions(service).create, "POST", **completion)
    add("/v1/chat/completions", Chat(service).create, "POST", **chat)
    add("/v1/models", system.models, "GET", answer=answers.ModelList)
    add("/v1/models/{model:path}", system.model, "GET", answer=answers.ModelCard, errors=(404,))
    add("/tokenize", tokenize.tokenize, "POST", body=TokenizeRequest, answer=answers.Tokenization)
    add(
        "/detokenize",
        tokenize.detokenize,
        "POST",
        body=DetokenizeRequest,
        answer=answers.Detokenization,
    )
    add("/health", system.health, "GET", errors=(503,))
    for method in ("GET", "POST"):
        add("/ping", system.health, method, errors=(503,))
    add("/version", system.version, "GET", answer=answers.Version)
    add("/load", system.load, "GET", answer=answers.Load)
    add("/metrics", system.metrics, "GET", media_type="text/plain")
    add("/pool", system.pool, "GET", media_type="application/json")


def _add_errors(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        return error_response(logged(error))

    for kind in (ApiError, EngineDeadError, HTTPException, QueueFullError, ValueError):
        app.add_exception_handler(kind, answer)


def _add_layers(app: FastAPI, service: Service) -> None:
    """Adds layers from the inside out."""
    settings = service.settings
    if settings.api_keys:
        app.add_middleware(Authentication, keys=settings.api_keys)
    if settings.allowed_origins:
        # Outside of authentication: a browser asks for permission without a key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
            expose_headers=(REQUEST_ID_HEADER,),
        )
    app.add_middleware(Gate, service=service)


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            servers=app.servers,
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas |= components()
        app.openapi_schema = document
    return app.openapi_schema
