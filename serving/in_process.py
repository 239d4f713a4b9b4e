"""An `AsyncLLM` of the same process as an `EngineClient`: for tests and for embedding the server.

`jpaged serve` runs the engine in a process of its own; this has the same behaviour without one,
but the engine's thread and the event loop share an interpreter, and nothing bounds the queue.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, cast

from jpaged.async_engine import AsyncLLM
from jpaged.errors import EngineDeadError
from jpaged.models.sources import DEFAULT_MODEL
from jpaged.outputs import RequestOutput
from jpaged.pool_view import PoolView, view_pool
from jpaged.prompts import Prompt
from jpaged.sampling_params import SamplingParams
from jpaged.serving.engine import EngineInfo
from jpaged.tokenizer import Tokenizer


class InProcessEngine:
    """Adapts an `AsyncLLM`, which it shuts down at the end."""

    def __init__(self, llm: AsyncLLM) -> None:
        engine = llm.engine
        self._llm = llm
        self._num_open = 0
        self._is_closing = False
        self._idle = asyncio.Event()
        self.info = EngineInfo(
            model=engine.config.model or DEFAULT_MODEL,
            max_model_len=engine.max_model_len,
            max_num_seqs=engine.scheduler.config.max_num_seqs,
            vocab_size=engine.model_config.vocab_size,
            max_logprobs=engine.config.max_logprobs,
            policy=engine.config.policy,
            block_size=engine.config.block_size,
            num_blocks=engine.runner.num_blocks,
            eos_token_ids=engine.eos_token_ids,
            default_sampling=engine.default_sampling,
        )

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        return self._llm.engine.tokenizer

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        fairness_key: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """See `EngineClient.generate`; all keys wait in one queue, so `fairness_key` is free."""
        del fairness_key
        if self._is_closing:
            raise EngineDeadError("the engine is shutting down")
        self._num_open += 1
        try:
            outputs = self._llm.generate(prompt, params, request_id, priority=priority)
            async with contextlib.aclosing(_generator(outputs)):
                async for output in outputs:
                    yield output
        finally:
            self._num_open -= 1
            if not self._num_open:
                self._idle.set()

    async def abort(self, request_id: str) -> None:
        """Ends a request; its iterator gets a last output with finish reason "abort"."""
        await self._llm.abort(request_id)

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if nothing more can run."""
        await self._llm.check_health()

    async def stats(self) -> dict[str, Any]:
        """The engine's counters as plain numbers."""
        return dataclasses.asdict(self._llm.stats())

    async def pool_view(self) -> dict[str, Any]:
        """The block pool as plain data."""
        return self._view().as_dict()

    async def shutdown(self, timeout_s: float = 0.0) -> None:
        """Refuses new requests, lets open ones go on for that long, then ends them."""
        self._is_closing = True
        if self._num_open and timeout_s > 0:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)
        await asyncio.to_thread(self._llm.shutdown)

    def _view(self) -> PoolView:
        manager = self._llm.engine.block_manager
        for _ in range(100):
            try:
                return view_pool(manager)
            except (RuntimeError, IndexError):  # the engine's thread changed what was being read
                continue
        return view_pool(manager)


def _generator(outputs: AsyncIterator[RequestOutput]) -> AsyncGenerator[RequestOutput, None]:
    return cast("AsyncGenerator[RequestOutput, None]", outputs)
