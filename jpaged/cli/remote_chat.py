"""`jpaged chat --url`: the conversation with a running server."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Generator, Mapping
from typing import Any

from jpaged.cli import chat, engine
from jpaged.cli.parser import CHAT_MAX_TOKENS, CHAT_TEMPERATURE
from jpaged.cli.streaming import Timing, write_text
from jpaged.sse import EventParser

try:
    import httpx2
except ModuleNotFoundError as error:
    raise ImportError('jpaged chat --url needs: pip install "jpaged[serve]"') from error

_CONNECT_TIMEOUT_S = 10.0


def run(args: argparse.Namespace) -> int:
    """Runs the command until the input ends and returns its exit code."""
    if given := engine.engine_options(args):
        name = next(iter(given))
        flag = {"model": "--model (the server's is --model-name)"}.get(
            name, "--" + name.replace("_", "-")
        )
        raise ValueError(f"--url takes no option of the engine, got {flag}")
    fields = engine.sampling_options(args, max_tokens=CHAT_MAX_TOKENS, temperature=CHAT_TEMPERATURE)
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # How long a model thinks is nobody's fault, how long a connection takes is.
    timeout = httpx2.Timeout(None, connect=_CONNECT_TIMEOUT_S)
    with httpx2.Client(base_url=_root(args.url), headers=headers, timeout=timeout) as client:
        try:
            model = args.model_name or _first_model(client)
        except ValueError as error:
            raise ValueError(f"{args.url}: {error}") from None
        if sys.stdin.isatty():
            print(f"jpaged: talking to {model} at {args.url}", file=sys.stderr)
        conversation = RemoteConversation(client, model, fields, args.system)
        chat.talk(conversation, show_stats=args.stats)
    return 0


def _root(url: str) -> str:
    """The URL without the version that clients of OpenAI's API write at its end."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url must begin with http:// or https://, got {url}")
    return url.rstrip("/").removesuffix("/v1")


def _first_model(client: httpx2.Client) -> str:
    try:
        response = client.get("/v1/models")
        _check(response)
        return str(response.json()["data"][0]["id"])
    except httpx2.TransportError as error:
        raise ValueError(f"no connection: {error}") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        if isinstance(error, _RefusedError):
            raise
        raise ValueError("the server names no model: give --model-name") from None


class _RefusedError(ValueError):
    """What a server said instead of an answer."""


class RemoteConversation:
    """What was said so far, and the server that continues it.

    Args:
        client: Knows the server.
        model: Asked for.
        fields: Sampling parameters of every answer.
        system: System message, or None.
    """

    def __init__(
        self,
        client: httpx2.Client,
        model: str,
        fields: Mapping[str, Any],
        system: str | None,
    ) -> None:
        self._client = client
        self._fields = {"model": model, **fields}
        self._opening = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[dict[str, str]] = list(self._opening)

    def reset(self) -> None:
        """See `Talk`."""
        self.messages = list(self._opening)

    def answer(self, text: str) -> str:
        """See `Talk`; Ctrl-C cuts the answer short, and the server notices."""
        messages = [*self.messages, {"role": "user", "content": text}]
        timing = Timing()
        said, end = "", "interrupted"
        try:
            with contextlib.closing(self._events(messages)) as events:
                for event in events:
                    piece, finish_reason = _news(event)
                    end = finish_reason or end
                    said += piece
                    timing.num_tokens += bool(piece)
                    timing.note()
                    write_text(piece)
                    _note_usage(timing, event.get("usage"))
        except KeyboardInterrupt:
            pass
        finally:
            if said:
                write_text("\n")
                self.messages = [*messages, {"role": "assistant", "content": said}]
        return timing.line(end)

    def _events(self, messages: list[dict[str, str]]) -> Generator[dict[str, Any], None, None]:
        body = {
            **self._fields,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        parser = EventParser()
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    _check(response)
                for chunk in response.iter_raw():
                    for event in parser.push(chunk):
                        if event == "[DONE]":
                            return
                        yield _parse(event)
        except httpx2.TransportError as error:
            raise ValueError(f"the connection failed: {error}") from None
        raise ValueError("the answer was cut off")


def _news(event: Mapping[str, Any]) -> tuple[str, str | None]:
    """The new text of an event, and the reason for the end if it is that."""
    for choice in event.get("choices") or ():
        return (choice.get("delta") or {}).get("content") or "", choice.get("finish_reason")
    return "", None


def _note_usage(timing: Timing, usage: Mapping[str, Any] | None) -> None:
    """Puts the server's own counts in place of ours."""
    if usage:
        timing.num_prompt_tokens = usage.get("prompt_tokens") or 0
        timing.num_tokens = usage.get("completion_tokens") or timing.num_tokens
        details = usage.get("prompt_tokens_details") or {}
        timing.num_cached_tokens = details.get("cached_tokens") or 0


def _parse(event: str) -> dict[str, Any]:
    try:
        parsed = json.loads(event)
    except ValueError:
        raise ValueError(f"the server sent something else than JSON: {event[:80]}") from None
    if error := parsed.get("error"):
        raise _RefusedError(str(error.get("message") if isinstance(error, dict) else error))
    return parsed


def _check(response: httpx2.Response) -> None:
    """Raises what the server says is wrong, if it does."""
    if response.status_code == 200:
        return
    try:
        error = response.json()["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        message = response.text
    line = " ".join(str(message).split())[:300]
    raise _RefusedError(f"HTTP {response.status_code}: {line}")
