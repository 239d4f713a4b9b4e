"""What all routes share: the engine, the settings, and what follows from them. One an app."""

import hashlib
import itertools
import os.path
import re
import time
from typing import Any

from starlette.requests import Request
from starlette.types import Scope

import jpaged
from jpaged.serving.engine import EngineClient
from jpaged.serving.errors import ApiError, bad_request
from jpaged.serving.metrics import Metrics
from jpaged.serving.prompt_reader import PromptReader
from jpaged.serving.settings import ServerSettings
from jpaged.serving.tracing import RequestTracer

REQUEST_ID_HEADER = "x-request-id"
REQUEST_ID = "jpaged.request_id"
"""Where a request's scope keeps its id."""

_ID_FORM = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class Service:
    """The state of one server.

    Attributes:
        engine: Runs the requests.
        settings: Of the server.
        reader: Turns texts into tokens.
        model_names: What clients may call the model; the first is shown.
        fingerprint: Of what makes an answer what it is; in every answer.
        started: When the server started, in seconds since 1970.
        num_open: Requests for text that are open now.
        metrics: Of all requests.
        tracer: Makes their spans, if there is a collector.
    """

    def __init__(self, engine: EngineClient, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        info = engine.info
        self.reader = PromptReader(
            engine.tokenizer, max_model_len=info.max_model_len, vocab_size=info.vocab_size
        )
        given = settings.served_model_names or _names_of(info.model)
        self.model_names = tuple(dict.fromkeys(given))
        digest = hashlib.sha256(repr((info, settings.chat_template)).encode()).hexdigest()
        self.fingerprint = f"jpaged-{jpaged.__version__}-{digest[:8]}"
        self.started = int(time.time())
        self.num_open = 0
        self.tracer: RequestTracer | None = None
        if settings.otlp_traces_endpoint is not None:
            self.tracer = RequestTracer(settings.otlp_traces_endpoint, self.model_names[0])
        self.metrics = Metrics(
            engine, self.model_names[0], None if self.tracer is None else self.tracer.record
        )
        self._counter = itertools.count()

    def model_name(self, asked: str | None) -> str:
        """The model's name for an answer.

        Raises:
            ApiError: There is no model of the name that was asked for.
        """
        if asked is None:
            return self.model_names[0]
        if asked not in self.model_names:
            names = ", ".join(self.model_names)
            raise ApiError(
                404,
                f"model {asked[:100]!r} does not exist; there is {names}",
                type="not_found_error",
                param="model",
                code="model_not_found",
            )
        return asked

    def answer_id(self, request: Request, prefix: str, own: str | None) -> str:
        """The id of an answer: what the body or else X-Request-Id says, or a new one.

        Raises:
            ApiError: It is no plain name.
        """
        if own is None:
            given = request.headers.get(REQUEST_ID_HEADER)
            if given is not None and not is_request_id(given):
                raise _bad_id("X-Request-Id", given)
        elif is_request_id(own):
            request.scope[REQUEST_ID] = own
        else:
            raise _bad_id("request_id", own)
        return f"{prefix}-{request.scope[REQUEST_ID]}"

    def engine_id(self, answer_id: str) -> str:
        """An id for the engine that no other request has, even if a client repeats its own."""
        return f"{answer_id}-{next(self._counter)}"

    def head(self, answer_id: str, kind: str, model: str) -> dict[str, Any]:
        """What all chunks of a stream begin with."""
        return {
            "id": answer_id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": self.fingerprint,
        }


def fairness_key(request: Request) -> str | None:
    """Whose request it is: that of an API key if there are keys, else of an address."""
    key = request.scope.get("jpaged.key")
    if key is not None:
        return key
    return request.client.host if request.client is not None else None


def route_path(scope: Scope) -> str:
    """The path as routes see it: without the part under which a proxy shows the server."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def is_request_id(text: str) -> bool:
    """Whether a text is plain enough to be an id."""
    return _ID_FORM.fullmatch(text) is not None


def _bad_id(field: str, got: str) -> ApiError:
    return bad_request(
        f"{field} must have 1 to 128 letters, digits or ._:/+=@-, got {got[:40]!r}", field
    )


def _names_of(model: str) -> tuple[str, ...]:
    """Names of a model that was given none: a path is shown by its last part only."""
    if os.path.isabs(model) or model.startswith((".", "~")) or os.path.exists(model):
        return os.path.basename(os.path.normpath(model)), model
    return (model,)
