"""Configuration of the engine's parts: frozen, checked when made, never changed afterwards.

Every number that a deployment may choose is a field here, with its default and its allowed range;
derived values are properties. Nothing below the command line reads environment variables or files.
"""

import dataclasses
from typing import Literal, get_args

BLOCK_SIZES = (8, 16, 32, 64, 128)
SchedulingPolicy = Literal["fcfs", "priority"]
PreemptionMode = Literal["recompute", "swap", "auto"]


def check_at_least(name: str, value: int, minimum: int) -> None:
    """Refuses anything but an integer of at least `minimum`.

    Raises:
        ValueError: if `value` is no integer or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The block pool.

    Attributes:
        num_blocks: blocks of the pool, the null block (id 0) included.
        block_size: tokens a block holds.
        enable_prefix_caching: whether full blocks are kept and shared by their content.
        num_host_blocks: blocks on the host, for what is swapped out; 0 for none.
        host_cache: whether cached blocks that are evicted from the pool are kept on the host.
    """

    num_blocks: int
    block_size: int = 16
    enable_prefix_caching: bool = True
    num_host_blocks: int = 0
    host_cache: bool = False

    def __post_init__(self) -> None:
        check_at_least("num_blocks", self.num_blocks, 2)
        check_at_least("num_host_blocks", self.num_host_blocks, 0)
        if self.host_cache and not (self.enable_prefix_caching and self.num_host_blocks):
            raise ValueError("host_cache needs enable_prefix_caching and num_host_blocks")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size!r}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """The budgets of a step and the order of requests.

    Attributes:
        max_num_seqs: sequences that may run at once; also the number of rows in the runner's
            arrays.
        max_num_batched_tokens: tokens of one step, decodes and prefill chunks together. At least
            `max_num_seqs`, so that every running sequence may decode in every step.
        max_model_len: tokens of one sequence, prompt and output together.
        policy: "fcfs" runs requests in order of arrival, "priority" by priority (lower first), then
            arrival.
        long_prefill_token_threshold: the most prompt tokens one sequence gets in a step; 0 for no
            limit but the budget.
        admission_watermark: share of the pool that admission leaves free for the sequences already
            running. With less, an overloaded engine preempts what it has just admitted:
            docs/paper.md has the throughput and the recomputed tokens of 1 to 10 %.
    """

    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    policy: SchedulingPolicy = "fcfs"
    long_prefill_token_threshold: int = 0
    admission_watermark: float = 0.05

    def __post_init__(self) -> None:
        check_at_least("max_model_len", self.max_model_len, 2)
        check_at_least("max_num_seqs", self.max_num_seqs, 1)
        check_at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        check_at_least("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens must be at least max_num_seqs, so that every sequence may "
                f"decode in a step, got max_num_batched_tokens={self.max_num_batched_tokens}, "
                f"max_num_seqs={self.max_num_seqs}"
            )
        if self.policy not in get_args(SchedulingPolicy):
            raise ValueError(
                f"policy must be one of {get_args(SchedulingPolicy)}, got {self.policy!r}"
            )
        if not 0.0 <= self.admission_watermark < 1.0:
            raise ValueError(
                f"admission_watermark must be in [0, 1), got {self.admission_watermark!r}"
            )
