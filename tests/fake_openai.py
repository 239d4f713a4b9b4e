"""A small server with OpenAI's API that answers as its prompts say, for tests of clients."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class FakeOpenAI:
    """Answers with `max_tokens` words; some words in a prompt make it fail.

    Attributes:
        bodies: The bodies of completions, as they came.
        headers: Their headers.
        base_url: Where it listens.
        num_model_failures: How often it says that it is starting.
        may_interrupt: Set by a test that has asked for a Ctrl-C in the middle of an answer.
        was_left: Set once a client leaves an answer that hangs.
    """

    model = "fake-model"
    max_model_len = 2048
    answer_id = "chatcmpl-0123456789abcdef"

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.base_url = ""
        self.num_model_failures = 0
        self.was_left = threading.Event()
        self.may_interrupt = threading.Event()
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        if self.num_model_failures:
            self.num_model_failures -= 1
            return JSONResponse({"error": {"message": "starting"}}, 503)
        return JSONResponse({"data": [{"id": self.model, "max_model_len": self.max_model_len}]})

    async def _tokenize(self, request: Request) -> Response:
        body = await request.json()
        return JSONResponse({"count": len(body["prompt"].split())})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        is_chat = "messages" in body
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        if "REFUSE" in prompt:
            return JSONResponse({"error": {"message": "top_p must be\nin (0, 1]"}}, 400)
        events = self._events(body, prompt, is_chat=is_chat)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], prompt: Any, *, is_chat: bool):
        def event(**fields: Any) -> str:
            return f"data: {json.dumps({'id': self.answer_id} | fields)}\n\n"

        def choice(text: str | None, finish_reason: str | None = None) -> str:
            part: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
            part |= {"delta": {"content": text}} if is_chat else {"text": text or ""}
            return event(choices=[part])

        if is_chat:
            yield event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
        for index in range(body["max_tokens"]):
            if "BREAK" in prompt and index == 1:
                yield event(error={"message": "the engine has ended", "code": 500})
                return
            if "CUT" in prompt and index == 1:
                return
            if "INTERRUPT" in prompt and index == 1:
                await asyncio.to_thread(self.may_interrupt.wait)
                os.kill(os.getpid(), signal.SIGINT)
            if ("HANG" in prompt or "INTERRUPT" in prompt) and index == 1:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.was_left.set()
            yield ": keep-alive\n\n" + choice(f"w{index} ")
        yield choice(None, "length")
        if body.get("stream_options", {}).get("include_usage"):
            size = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
            yield event(
                choices=[], usage={"prompt_tokens": size, "completion_tokens": body["max_tokens"]}
            )
        yield "data: [DONE]\n\n"


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
    """The address of a server that runs the application in a thread."""
    # The socket listens before the server runs: a client waits in its queue until then.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
