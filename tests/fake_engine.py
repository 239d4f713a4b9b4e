"""An engine of the HTTP layer that answers what a test tells it to, and keeps what it was asked."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

import tiny_text_model

from jpaged.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.serving.engine import EngineInfo
from jpaged.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }}{{ c.function.arguments.items()|list }}]"
    "{% endfor %}</s>{% endfor %}"
    "{% if tools %}tools:{{ tools|map(attribute='function.name')|join(',') }}{% endif %}"
    "{% if style %}style:{{ style }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclasses.dataclass
class Asked:
    """One request that came to the engine."""

    prompt: Any
    params: SamplingParams
    request_id: str
    priority: int
    fairness_key: str | None
    is_open: bool = True
    was_cut: bool = False


class FakeEngine:
    """Every prompt gets the same pieces, one a step.

    Attributes:
        pieces: Text of each token.
        error: Raised instead of an answer, or after `error_after` pieces.
        hold: If set, each piece after the first waits for it.
        is_dead: Whether `check_health` fails.
        asked: Requests in the order they came.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, max_model_len: int = 128) -> None:
        self.tokenizer = tokenizer
        self.info = EngineInfo(
            model="tiny",
            max_model_len=max_model_len,
            max_num_seqs=16,
            vocab_size=96,
            max_logprobs=20,
            policy="priority",
            block_size=8,
            num_blocks=80,
            eos_token_ids=(2,),
        )
        self.pieces: list[str] = ["Hel", "lo", " wörld", "!"]
        self.finish_reason = "stop"
        self.error: Exception | None = None
        self.error_after = 0
        self.hold: asyncio.Event | None = None
        self.dead: Exception | None = None
        self.asked: list[Asked] = []

    async def generate(
        self,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        fairness_key: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        asked = Asked(prompt, params, request_id, priority, fairness_key)
        self.asked.append(asked)
        finished = False
        try:
            if self.error is not None and not self.error_after:
                raise self.error
            steps = [self._output(asked, [i]) for i in range(len(self.pieces))]
            is_delta = params.output_kind is RequestOutputKind.DELTA
            if not is_delta:
                steps = [self._output(asked, list(range(len(self.pieces))))]
            for i, output in enumerate(steps):
                if self.hold is not None and (i or not is_delta):
                    await self.hold.wait()
                if self.error is not None and i == self.error_after:
                    raise self.error
                await asyncio.sleep(0)
                finished = output.finished
                yield output
        finally:
            asked.is_open, asked.was_cut = False, not finished

    def _output(self, asked: Asked, places: list[int]) -> RequestOutput:
        params, ids = asked.params, list(asked.prompt["prompt_token_ids"])
        finished = places[-1] == len(self.pieces) - 1
        token_ids = [10 + place for place in places]
        parts = [
            CompletionOutput(
                index,
                "".join(self.pieces[place] for place in places),
                token_ids,
                logprobs=None
                if params.logprobs is None
                else [self._position(10 + p, self.pieces[p], params.logprobs) for p in places],
                finish_reason=self.finish_reason if finished else None,
            )
            for index in range(params.n)
        ]
        output = RequestOutput(asked.request_id, asked.prompt.get("prompt"), ids, parts, finished)
        output.num_cached_tokens = 8
        now = time.monotonic()
        output.metrics = RequestMetrics(now, now, now, now if finished else None)
        if params.prompt_logprobs is not None:
            first = [None]
            rest = [self._position(i, f"<{i}>", params.prompt_logprobs) for i in ids[1:]]
            output.prompt_logprobs = [*first, *rest]
        return output

    def _position(self, token_id: int, text: str, num: int) -> dict[int, Logprob]:
        others = {50 + i: Logprob(-1.0 - i, 1 + i, f"o{i}") for i in range(num)}
        return {token_id: Logprob(-0.5 if num == 0 else -9.0, num + 1, text)} | others

    async def abort(self, request_id: str) -> None:
        raise AssertionError("leaving the iterator is how a request is ended")

    async def check_health(self) -> None:
        if self.dead is not None:
            raise self.dead

    async def stats(self) -> dict[str, Any]:
        return {}

    async def pool_view(self) -> dict[str, Any]:
        return {"block_size": 8}

    async def shutdown(self, timeout_s: float = 0.0) -> None:
        self.dead = RuntimeError("shut down")


def make_tokenizer(directory: Any) -> Tokenizer:
    """The tokenizer of the tiny model, with a chat template."""
    from jpaged.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_text_model.write_model(directory / "tiny"))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
