"""An answer of a server: what it was and when its pieces came."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jpaged.sse import EventParser


@dataclasses.dataclass(slots=True)
class Answer:
    """How a request went.

    Attributes:
        prompt_tokens: Tokens of the prompt, as the server counts them if it does.
        output_tokens: Tokens of the answer, likewise; else the number of its pieces.
        start_s: When it was sent, on the clock of `time.perf_counter`.
        late_s: How much later than planned that was; waiting for `max_concurrency` counts.
        ttft_s: From then to the first piece of text.
        itls_s: Times between pieces of text.
        latency_s: From the start to the end of the answer.
        text: The answer.
        error: What went wrong, in one line; None if it went well.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    start_s: float = 0.0
    late_s: float = 0.0
    ttft_s: float = 0.0
    itls_s: list[float] = dataclasses.field(default_factory=list)
    latency_s: float = 0.0
    text: str = ""
    error: str | None = None

    @property
    def tpot_s(self) -> float:
        """Mean time of each token after the first; 0 if there is none."""
        return (self.latency_s - self.ttft_s) / max(self.output_tokens - 1, 1)


class AnswerReader:
    """Fills in an answer from the pieces of its stream.

    Args:
        answer: With its start.
        is_chat: Whether the events are those of chat completions.
    """

    def __init__(self, answer: Answer, *, is_chat: bool) -> None:
        self._answer = answer
        self._is_chat = is_chat
        self._events = EventParser()
        self._last_s = 0.0
        self._num_pieces = 0
        self._usage: Mapping[str, Any] | None = None
        self._is_done = False

    def push(self, piece: bytes, now_s: float) -> None:
        """Takes in what came at this time.

        Raises:
            ValueError: The server tells of an error, or an event has another form.
        """
        for event in self._events.push(piece):
            if event == "[DONE]":
                self._is_done = True
                continue
            try:
                self._take(json.loads(event), now_s)
            except (AttributeError, TypeError, json.JSONDecodeError):
                raise ValueError(f"malformed event in the stream: {event[:80]}") from None

    def _take(self, event: Mapping[str, Any], now_s: float) -> None:
        if error := event.get("error"):
            message = error.get("message") if isinstance(error, Mapping) else error
            raise ValueError(f"error in the stream: {message}")
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            text = self._text(choice)
            if text is not None:
                self._answer.text += text
                self._note_piece(now_s)
            self._answer.latency_s = now_s - self._answer.start_s

    def _text(self, choice: Mapping[str, Any]) -> str | None:
        """The new text of a choice; None for an event that tells only the role or the end."""
        if not self._is_chat:
            text = choice.get("text") or ""
            return text if text or choice.get("finish_reason") is None else None
        delta = choice.get("delta") or {}
        text = delta.get("content") or delta.get("reasoning_content") or ""
        return text if text or delta.get("tool_calls") else None

    def _note_piece(self, now_s: float) -> None:
        if self._num_pieces == 0:
            self._answer.ttft_s = now_s - self._answer.start_s
        else:
            self._answer.itls_s.append(now_s - self._last_s)
        self._last_s = now_s
        self._num_pieces += 1

    def finish(self) -> None:
        """Takes in the end of the stream.

        Raises:
            ValueError: It came too early, or there was no text.
        """
        if not self._is_done:
            raise ValueError("the stream ended before data: [DONE]")
        usage = self._usage or {}
        self._answer.prompt_tokens = usage.get("prompt_tokens") or self._answer.prompt_tokens
        self._answer.output_tokens = usage.get("completion_tokens") or self._num_pieces
        if self._num_pieces == 0:
            raise ValueError("the answer has no text")
