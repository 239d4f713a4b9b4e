"""How many blocks the pool gets: from an explicit number, from bytes, or from what is left."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jpaged.config import SchedulerConfig
from jpaged.engine_config import DEFAULT_CPU_CACHE_BYTES, EngineConfig
from jpaged.pallas_kernels import KVCacheSpec

logger = logging.getLogger(__name__)

HOST_BLOCKS_A_BLOCK = 8
"""Of a host pool whose size is left open, at most: a small model's would have a million blocks."""


def num_blocks(
    config: EngineConfig,
    scheduler_config: SchedulerConfig,
    spec: KVCacheSpec,
    *,
    num_layers: int,
    step_temp_bytes: Callable[[int], int],
    devices: Sequence[Any],
) -> int:
    """Blocks of the pool, the null block included.

    Args:
        config: What the user set.
        scheduler_config: The budgets; the pool must hold one sequence of `max_model_len`.
        spec: One layer's blocks, a device's share of them.
        num_layers: Layers, each with a pool of its own.
        step_temp_bytes: Bytes that a device needs for the largest step beside its arguments, given
            a number of blocks to compile it for; only called where the pool is sized by what is
            left.
        devices: Who has a share.

    Raises:
        ValueError: The pool cannot hold one sequence of `max_model_len` tokens.
    """
    max_blocks = -(-scheduler_config.max_model_len // spec.block_size)
    least = max_blocks + 1
    # More than every sequence at full length can never be used.
    most = max_blocks * scheduler_config.max_num_seqs + 1
    block_bytes = spec.block_bytes * num_layers
    if config.num_blocks is not None:
        blocks, field = config.num_blocks, "num_blocks"
    elif config.kv_cache_memory_bytes is not None:
        blocks, field = config.kv_cache_memory_bytes // block_bytes, "kv_cache_memory_bytes"
    elif jax.default_backend() == "cpu":
        blocks, field = DEFAULT_CPU_CACHE_BYTES // block_bytes, "kv_cache_memory_bytes"
        blocks = min(blocks, most)
    else:
        left = min(_bytes_left(device, config.memory_utilization) for device in devices)
        left -= step_temp_bytes(least)
        blocks, field = min(left // block_bytes, most), "memory_utilization"
    if blocks < least:
        raise ValueError(
            f"max_model_len of {scheduler_config.max_model_len} tokens needs {least} blocks of "
            f"{spec.block_size} ({least * block_bytes / 1e6:.0f} MB, the null block included), but "
            f"the pool has {max(blocks, 0)}: raise {field} or lower max_model_len"
        )
    logger.info(
        "block pool: %d blocks of %d tokens, %.0f MB",
        blocks,
        spec.block_size,
        blocks * block_bytes / 1e6,
    )
    return blocks


def num_host_blocks(
    config: EngineConfig, spec: KVCacheSpec, *, num_layers: int, num_blocks: int
) -> int:
    """Blocks of the host pool; 0 where nothing is ever swapped.

    Args:
        config: What the user set.
        spec: One layer's blocks.
        num_layers: Layers, each with a pool of its own.
        num_blocks: Blocks of each pool.

    Raises:
        ValueError: `swap_space` does not hold a single block.
    """
    if not config.swaps:
        return 0
    block_bytes = spec.block_bytes * num_layers
    blocks = config.swap_bytes // block_bytes
    if blocks < 1:
        raise ValueError(
            f"swap_space must be at least a block's {block_bytes / 2**30:.3g} GiB, "
            f"got {config.swap_bytes / 2**30:.3g}"
        )
    return (
        blocks if config.swap_space is not None else min(blocks, HOST_BLOCKS_A_BLOCK * num_blocks)
    )


def _bytes_left(device: Any, utilization: float) -> int:
    """Bytes of a device that are neither used nor held back by `memory_utilization`."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise ValueError(
            "this device does not tell its memory: set num_blocks or kv_cache_memory_bytes"
        )
    return int(stats["bytes_limit"] * utilization) - stats["bytes_in_use"]
