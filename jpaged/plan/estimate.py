"""What a step must cost at least, part by part: a model, not a measurement.

Every part is bound by the bytes that it reads, by its FLOPs or by the links between devices; parts
follow one another and nothing overlaps but reading and computing within a part. On GPUs a layer
costs a fixed time besides, taken from the smallest step that was measured (docs/plan.md). What the
host does, and what kernels lose against these rates, is not in it.
"""

import dataclasses
from typing import Literal

from jpaged.models.config import ModelConfig
from jpaged.models.sharding import local_config
from jpaged.plan.targets import Device

Bound = Literal["memory", "compute", "links", "fixed"]

GPU_LAYER_S = 29e-6
"""What a layer costs a GPU beyond these parts: launches, and kernels that end unevenly.

Decode steps of one and of eight sequences of 1,024 tokens on an H200 took 4.27 and 4.46 ms, their
parts at their ceilings 3.31 and 3.51: 30 and 29 us for each of 32 layers (step_h200.json of
benchmarks/results).
"""
STATE_BYTES_OF_TOKEN = 4 + 4 + 1 + 1 / 8
"""Of the sampler's state, a row and a token of the vocabulary: counts, biases, two masks."""
GPU_LOGITS_COPIES = 4
"""Of f32 logits: as they are, processed, their weights and what sorting them takes."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one step does.

    Attributes:
        num_tokens: Tokens of the step.
        num_sampled: Rows of logits.
        decode_context: Context lengths of the decodes, summed.
        prefill_pairs: Pairs of a prompt's token and a token that it sees, summed.
    """

    num_tokens: int
    num_sampled: int
    decode_context: int = 0
    prefill_pairs: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A part of a step: its time and what that is bound by."""

    name: str
    seconds: float
    bound: Bound


@dataclasses.dataclass(frozen=True, slots=True)
class StepTime:
    """The parts of a step, in order."""

    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(part.seconds for part in self.parts)

    @property
    def bound(self) -> Bound:
        """By what most of it is bound."""
        by: dict[Bound, float] = {}
        for part in self.parts:
            by[part.bound] = by.get(part.bound, 0.0) + part.seconds
        return max(by, key=lambda bound: by[bound])

    def of(self, *names: str) -> float:
        """Seconds of these parts."""
        return sum(part.seconds for part in self.parts if part.name in names)


def decode_work(num_seqs: int, context_len: int) -> Work:
    """A step in which so many sequences decode, each with so much context."""
    return Work(num_tokens=num_seqs, num_sampled=num_seqs, decode_context=num_seqs * context_len)


def prefill_work(num_tokens: int, context_len: int) -> Work:
    """A step full of prompts of `context_len` tokens, at the average of their chunks."""
    return Work(
        num_tokens=num_tokens,
        num_sampled=max(num_tokens // context_len, 1),
        prefill_pairs=num_tokens * (context_len + 1) // 2,
    )


def layer_params(config: ModelConfig) -> int:
    """Weights of the matrix products of one layer."""
    attention = config.hidden_size * (config.qkv_size + config.num_heads * config.head_dim)
    return attention + 3 * config.hidden_size * config.intermediate_size


def head_params(config: ModelConfig) -> int:
    """Weights of the output projection, and so of the embedding."""
    return config.hidden_size * config.vocab_size


def weight_bytes(share: ModelConfig, itemsize: int) -> int:
    """Bytes of the weights of a model, or of a device's share; norms and biases are left out."""
    tables = 1 if share.tie_word_embeddings else 2
    return (share.num_layers * layer_params(share) + tables * head_params(share)) * itemsize


def block_bytes(share: ModelConfig, itemsize: int, block_size: int) -> int:
    """Bytes of a block in all layers."""
    return 2 * share.num_layers * share.num_kv_heads * share.head_dim * block_size * itemsize


def state_bytes(config: ModelConfig, num_rows: int) -> int:
    """Bytes of the sampler's state, which every device holds whole."""
    return int(num_rows * config.vocab_size * STATE_BYTES_OF_TOKEN)


def own_rows(num_rows: int, tensor_parallel_size: int) -> int:
    """Rows of logits that each device samples, as `CausalLM.row_share` says."""
    return num_rows if num_rows % tensor_parallel_size else num_rows // tensor_parallel_size


def gpu_temp_bytes(
    share: ModelConfig, vocab_size: int, itemsize: int, num_tokens: int, num_rows: int
) -> int:
    """What the largest step is taken to need beside its arguments, where nothing is compiled.

    The stream three times and the MLP's two projections of every token, and the logits of the rows
    that a device samples `GPU_LOGITS_COPIES` times.
    """
    width = 3 * share.hidden_size + 2 * share.intermediate_size
    return num_tokens * width * itemsize + 4 * GPU_LOGITS_COPIES * num_rows * vocab_size


def step_time(
    config: ModelConfig, device: Device, itemsize: int, tensor_parallel_size: int, work: Work
) -> StepTime:
    """The roofline of one step.

    Args:
        config: The model.
        device: Each of the devices that share it.
        itemsize: Bytes of a weight, and of a number of K or V.
        tensor_parallel_size: How many devices share every layer.
        work: What the step does.
    """
    share = local_config(config, tensor_parallel_size)
    layers = config.num_layers
    # Logits are written and read again to be sampled from, as f32; each device has some rows.
    logits_bytes = 8 * own_rows(work.num_sampled, tensor_parallel_size) * config.vocab_size
    parts = [
        _product("layers", device, work.num_tokens, layers * layer_params(share), itemsize),
        _product("logits", device, work.num_sampled, head_params(share), itemsize),
        _attention(share, device, itemsize, work),
        Part("sampling", logits_bytes / device.read_bytes_s, "memory"),
    ]
    if device.platform == "gpu":
        parts.append(Part("fixed", layers * GPU_LAYER_S, "fixed"))
    if tensor_parallel_size > 1:
        parts.append(_links(config, device, itemsize, tensor_parallel_size, work))
    return StepTime(tuple(part for part in parts if part.seconds))


def _product(name: str, device: Device, num_rows: int, num_params: int, itemsize: int) -> Part:
    reading = num_params * itemsize / device.read_bytes_s
    computing = 2 * num_rows * num_params / device.matmul_flop_s
    return Part(name, max(reading, computing), "memory" if reading >= computing else "compute")


def _attention(share: ModelConfig, device: Device, itemsize: int, work: Work) -> Part:
    kv_heads = share.num_layers * share.num_kv_heads
    token_bytes = 2 * kv_heads * share.head_dim * itemsize
    reading = work.decode_context * token_bytes / device.read_bytes_s
    computing = 0.0
    if device.decode_cycles:
        computing = work.decode_context * kv_heads * device.decode_cycles / device.clock_hz
    heads = share.num_layers * share.num_heads
    prefill = 4 * heads * share.head_dim * work.prefill_pairs / device.attention_flop_s
    decode = max(reading, computing)
    is_read = reading >= computing and decode >= prefill
    return Part("attention", decode + prefill, "memory" if is_read else "compute")


def _links(config: ModelConfig, device: Device, itemsize: int, size: int, work: Work) -> Part:
    """Two sums over the devices a layer and one of the embedding, and logits for their rows."""
    num_sums = 2 * config.num_layers + 1
    summed = num_sums * work.num_tokens * config.hidden_size * itemsize
    exchanged = own_rows(work.num_sampled, size) * config.vocab_size * 4
    sent = (2 * summed + exchanged) * (size - 1) / size
    waits = num_sums * device.hops(size) * device.link_latency_s
    return Part("links", sent / device.link_bytes_s + waits, "links")
