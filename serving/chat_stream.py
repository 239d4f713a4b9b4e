"""A conversation's answer as a stream of chunks."""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from msgspec import UNSET

from jpaged.outputs import CompletionOutput
from jpaged.serving.answers import ChatChunkChoice, ChatDelta, FunctionDelta, ToolCallDelta
from jpaged.serving.chat_run import ChatRun
from jpaged.serving.responses import usage_of, usage_wishes
from jpaged.serving.service import Service
from jpaged.serving.streaming import DONE, ChunkWriter
from jpaged.serving.tool_parsers import ToolDelta, ToolStream


@dataclasses.dataclass(slots=True)
class _Told:
    """What was already told of one choice."""

    reader: ToolStream | None
    num_tokens: int = 0
    has_calls: bool = False


class ChatStream:
    """Writes the chunks of one request.

    Args:
        service: Of the server.
        run: The request.
    """

    def __init__(self, service: Service, run: ChatRun) -> None:
        self._run = run
        self._plan = run.plan
        self._with_usage, self._each_usage = usage_wishes(run.body, service.settings)
        head = service.head(run.answer_id, "chat.completion.chunk", run.model)
        if run.body.return_token_ids:
            (job,) = run.generation.jobs
            self._first_writer = ChunkWriter(
                {**head, "prompt_token_ids": job.token_ids}, with_usage=self._with_usage
            )
        else:
            self._first_writer = None
        self._writer = ChunkWriter(head, with_usage=self._with_usage)
        self._told: dict[int, _Told] = {}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of the stream, those of one engine step together."""
        run = self._run
        num_prompt = num_cached = 0
        stream = run.generation.stream(run.body.stream_interval or 1)
        async with contextlib.aclosing(stream):
            async for _, output in stream:
                num_prompt = len(output.prompt_token_ids)
                num_cached = output.num_cached_tokens
                chunks: list[bytes] = []
                for part in output.outputs:
                    self._add(part, chunks, num_prompt, num_cached)
                if chunks:
                    yield b"".join(chunks)
        if self._with_usage:
            num_tokens = sum(told.num_tokens for told in self._told.values())
            yield self._writer.last(usage_of(num_prompt, num_tokens, num_cached))
        yield DONE

    def _add(
        self, part: CompletionOutput, chunks: list[bytes], num_prompt: int, num_cached: int
    ) -> None:
        """Adds the chunks that tell what is new of one choice."""
        run = self._run
        told = self._told.get(part.index)
        choices: list[ChatChunkChoice] = []
        if told is None:
            reader = None if self._plan.stream is None else self._plan.stream()
            told = self._told[part.index] = _Told(reader)
            opening = ChatChunkChoice(part.index, ChatDelta(run.role, ""))
            writer = self._first_writer or self._writer
            chunks.append(writer.chunk(opening, self._usage(told, num_prompt, num_cached)))
        told.num_tokens += len(part.token_ids)
        if told.reader is None:
            deltas = [ChatDelta(content=part.text)] if part.text else []
        else:
            deltas = self._read(told, told.reader, part)
        choices = [ChatChunkChoice(part.index, delta) for delta in deltas]
        is_wordy = run.num_top is not None or run.body.return_token_ids
        if not choices and (part.finished or is_wordy):
            choices = [ChatChunkChoice(part.index, ChatDelta())]
        if not choices:
            return
        if is_wordy:
            choices[0].logprobs = run.logprobs(part)
            if run.body.return_token_ids:
                choices[0].token_ids = part.token_ids
        if part.finished:
            self._finish(choices[-1], part, told)
        usage = self._usage(told, num_prompt, num_cached)
        chunks += [self._writer.chunk(choice, usage) for choice in choices]

    def _usage(self, told: _Told, num_prompt: int, num_cached: int) -> Any:
        if not self._each_usage:
            return None
        return usage_of(num_prompt, told.num_tokens, num_cached)

    def _finish(self, choice: ChatChunkChoice, part: CompletionOutput, told: _Told) -> None:
        reason: Any = part.finish_reason
        if told.has_calls and self._plan.calls_end_answer and reason == "stop":
            reason = "tool_calls"
        choice.finish_reason = reason
        choice.stop_reason = part.stop_reason

    def _read(self, told: _Told, reader: ToolStream, part: CompletionOutput) -> list[ChatDelta]:
        found = reader.push(part.text)
        if part.finished:
            found = [*found, *reader.finish()]
        deltas = []
        for delta in found:
            if delta.content is not None:
                deltas.append(ChatDelta(content=delta.content))
            elif not (self._plan.only_one and delta.index):
                told.has_calls = True
                deltas.append(ChatDelta(tool_calls=[self._call(delta)]))
        return deltas

    def _call(self, delta: ToolDelta) -> ToolCallDelta:
        assert delta.index is not None, "a delta is text or a piece of a call"
        is_first = delta.name is not None
        # OpenAI's clients add arguments up, and want them to begin as a string.
        arguments = delta.arguments if delta.arguments is not None else ("" if is_first else UNSET)
        return ToolCallDelta(
            index=delta.index,
            function=FunctionDelta(delta.name if delta.name is not None else UNSET, arguments),
            id=self._plan.call_id() if is_first else UNSET,
            type="function" if is_first else UNSET,
        )
