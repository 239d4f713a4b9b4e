"""The names of all metrics that a server tells, for tests of what asks for them."""

import asyncio
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from jpaged.serving.engine import EngineInfo
from jpaged.serving.messages import STEP_TOKEN_BOUNDS
from jpaged.serving.metrics import Metrics


class _Everything(dict):
    """Counters of an engine that has every one, all of them 1."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> "_Everything":
        return _Everything()

    def __float__(self) -> float:
        return 1.0

    def __truediv__(self, other: Any) -> float:
        return 1.0


class _Engine:
    info = EngineInfo(
        model="m",
        max_model_len=1,
        max_num_seqs=1,
        vocab_size=1,
        max_logprobs=1,
        policy="fcfs",
        block_size=1,
        num_blocks=1,
    )

    async def stats(self) -> dict[str, Any]:
        steps = {"counts": [0] * (len(STEP_TOKEN_BOUNDS) + 1), "sum": 0}
        return _Everything(step_tokens=steps)


def metric_names() -> set[str]:
    """Names without the prefix, and of counters without `_total`."""
    metrics = Metrics(_Engine())  # pyright: ignore[reportArgumentType]
    asyncio.run(metrics.refresh())
    text = metrics.render()[0].decode()
    return {family.name.removeprefix("jpaged:") for family in text_string_to_metric_families(text)}
