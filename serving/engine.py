"""What the HTTP layer needs of an engine, and the errors that cross from one to the other."""

import dataclasses
from collections.abc import AsyncIterator
from typing import Any, Protocol

from jpaged.errors import EngineDeadError as EngineDeadError
from jpaged.errors import QueueFullError as QueueFullError
from jpaged.outputs import RequestOutput
from jpaged.prompts import Prompt
from jpaged.sampling_params import SamplingParams
from jpaged.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What is fixed once an engine runs."""

    model: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    max_logprobs: int
    policy: str
    block_size: int
    num_blocks: int
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: dict[str, float] = dataclasses.field(default_factory=dict)
    """Fields of `SamplingParams` that hold where a request leaves them open."""


class EngineClient(Protocol):
    """An engine as the HTTP layer sees it."""

    @property
    def info(self) -> EngineInfo:
        """What is fixed once the engine runs."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        ...

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        fairness_key: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of a request as they come; leaving early aborts it and frees its blocks.

        Raises:
            ValueError: Prompt or parameters are out of range; the text is for the user.
            QueueFullError: Too much waits already.
            EngineDeadError: The engine has ended.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Ends a request; its iterator gets a last output with finish reason "abort"."""
        ...

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if nothing more can run."""
        ...

    async def stats(self) -> dict[str, Any]:
        """The engine's counters as plain numbers, by the names of `EngineStats` (nested dicts)."""
        ...

    async def pool_view(self) -> dict[str, Any]:
        """The block pool as plain data, for the live picture."""
        ...

    async def shutdown(self, timeout_s: float = 0.0) -> None:
        """Refuses new requests, lets open ones go on for that long, then ends them."""
        ...
