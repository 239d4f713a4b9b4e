"""A client of an OpenAI-compatible server that notes when each piece of an answer comes."""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any, Self

import aiohttp

from jpaged.bench.answers import Answer, AnswerReader
from jpaged.bench.requests import BenchRequest

CHAT_ENDPOINT = "/v1/chat/completions"
_OWN_FIELDS = ("model", "prompt", "messages", "stream", "stream_options")
_TIMEOUT_S = 6 * 3600  # a request may wait that long behind others, but not forever


class Client:
    """Connections to one server; to be used as an asynchronous context.

    Args:
        base_url: Where the server is, as http://127.0.0.1:8000.
        endpoint: Path of completions or chat completions.
        api_key: Sent as a bearer token if given.
        headers: Further headers.
        fields: Further fields of each request's body.
        verify_tls: Whether the server's certificate has to be a good one.

    Raises:
        ValueError: `fields` has one that the benchmark sets itself.
    """

    def __init__(
        self,
        base_url: str,
        endpoint: str,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        fields: Mapping[str, Any] | None = None,
        verify_tls: bool = True,
    ) -> None:
        for name in _OWN_FIELDS:
            if name in (fields or {}):
                raise ValueError(f"extra_body must not set {name}: the benchmark does")
        self._base_url = base_url.rstrip("/")
        self._endpoint = "/" + endpoint.lstrip("/")
        self._fields = dict(fields or {})
        self._headers = dict(headers or {})
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._verify_tls = verify_tls
        self._session: aiohttp.ClientSession | None = None

    @property
    def is_chat(self) -> bool:
        """Whether requests are conversations."""
        return self._endpoint.endswith("/chat/completions")

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._verify_tls),
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.close()

    @property
    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "the client is used outside of its context"
        return self._session

    async def models(self) -> list[dict[str, Any]]:
        """The models that the server names.

        Raises:
            RuntimeError: It does not answer, or not as it should.
        """
        try:
            data = await self._json("GET", "/v1/models", None)
            return list(data["data"])
        except (KeyError, TypeError):
            raise RuntimeError(f"{self._base_url}/v1/models is no list of models") from None

    async def count_tokens(self, model: str, texts: list[str]) -> list[int]:
        """How many tokens the server makes of each text.

        Raises:
            RuntimeError: It has no /tokenize.
        """
        gate = asyncio.Semaphore(16)

        async def count(text: str) -> int:
            async with gate:
                body = {"model": model, "prompt": text, "add_special_tokens": False}
                return int((await self._json("POST", "/tokenize", body))["count"])

        return list(await asyncio.gather(*map(count, texts)))

    async def _json(self, method: str, path: str, body: Any) -> Any:
        try:
            async with self._open.request(method, self._base_url + path, json=body) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RuntimeError(f"{self._base_url}{path}: {_describe(error)}") from None
        if response.status != 200:
            raise RuntimeError(f"{self._base_url}{path} answered {_refusal(response.status, text)}")
        try:
            return json.loads(text)
        except ValueError:
            raise RuntimeError(f"{self._base_url}{path} did not answer with JSON") from None

    def body(self, request: BenchRequest, model: str) -> dict[str, Any]:
        """What is sent for a request.

        Raises:
            ValueError: The prompt is not of the endpoint's kind.
        """
        body: dict[str, Any] = {"model": model}
        if self.is_chat:
            if isinstance(request.prompt, str):
                body["messages"] = [{"role": "user", "content": request.prompt}]
            elif request.is_chat:
                body["messages"] = request.prompt
            else:
                raise ValueError("prompts of token ids need --endpoint /v1/completions")
        elif request.is_chat:
            raise ValueError(f"messages need --endpoint {CHAT_ENDPOINT}")
        else:
            body["prompt"] = request.prompt
        body["max_tokens"] = request.max_tokens
        return body | {"stream": True, "stream_options": {"include_usage": True}} | self._fields

    async def send(self, request: BenchRequest, model: str) -> Answer:
        """Sends a request and reads its answer; whatever fails stands in the answer."""
        answer = Answer(prompt_tokens=request.prompt_tokens or 0)
        data = json.dumps(self.body(request, model)).encode()
        reader = AnswerReader(answer, is_chat=self.is_chat)
        answer.start_s = time.perf_counter()
        try:
            async with self._open.post(
                self._base_url + self._endpoint,
                data=data,
                headers={"Content-Type": "application/json"},
            ) as response:
                if response.status != 200:
                    answer.error = _refusal(response.status, await response.text())
                else:
                    async for piece in response.content.iter_any():
                        reader.push(piece, time.perf_counter())
                    reader.finish()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            answer.error = _describe(error)
        if answer.error is not None:
            answer.latency_s = time.perf_counter() - answer.start_s
        return answer


def _refusal(status: int, text: str) -> str:
    """An answer that is an error, in one line."""
    try:
        error = json.loads(text)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        message = text
    return f"HTTP {status}: {' '.join(str(message).split())[:200]}"


def _describe(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {error.os_error.strerror or error.os_error}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
