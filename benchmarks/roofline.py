"""What a decoder's work must cost at least, at the measured ceilings of a GPU.

Three parts a step, nothing overlapped and nothing else counted: the matrix products read every
weight once or are bound by their FLOPs; decode attention reads K and V of the context once; prefill
attention does the FLOPs of the visible pairs.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What one GPU was measured to reach; the defaults are an NVIDIA H200's.

    Attributes:
        read_bytes_s: reading a bf16 matrix of 1 GB in a matrix-vector product.
        matmul_flop_s: a bf16 matrix product of 8192 x 8192 x 8192 through XLA.
        prefill_flop_s: FlashAttention-3, its best.
    """

    read_bytes_s: float = 4.58e12
    matmul_flop_s: float = 828e12
    prefill_flop_s: float = 650e12


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes that decide the work; weights and KV in 2 bytes a number."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def layer_params(self) -> int:
        """Weights of the matrix products of all layers."""
        attention = self.hidden_size * (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_params(self) -> int:
        """Weights of the output projection."""
        return self.hidden_size * self.vocab_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def attention_flops(self, pairs: float) -> float:
        """FLOPs of all layers for so many pairs of a query token and a visible token."""
        return 4.0 * self.num_layers * self.num_heads * self.head_dim * pairs


def visible_pairs(num_queries: int, seq_len: int) -> int:
    """Pairs of a query and a token it sees; the queries are the last tokens of the context."""
    return num_queries * (seq_len - num_queries) + num_queries * (num_queries + 1) // 2


def product_floor_s(num_rows: int, num_params: int, ceilings: Ceilings) -> float:
    """Seconds of matrix products of so many rows with so many bf16 weights."""
    flops, num_bytes = 2.0 * num_rows * num_params, 2.0 * num_params
    return max(flops / ceilings.matmul_flop_s, num_bytes / ceilings.read_bytes_s)


def step_floor_s(
    model: ModelShape,
    ceilings: Ceilings,
    *,
    num_tokens: int,
    num_sampled: int,
    decode_context: int,
    prefill_pairs: int = 0,
) -> dict[str, float]:
    """Seconds of each part of one step.

    Args:
        model: Sizes of the model.
        ceilings: Of the GPU.
        num_tokens: Tokens of the step, decodes and chunks together.
        num_sampled: Rows of logits.
        decode_context: Context lengths of the decodes, summed.
        prefill_pairs: Visible pairs of the chunks, summed.
    """
    gemm = product_floor_s(num_tokens, model.layer_params, ceilings)
    if num_sampled:
        gemm += product_floor_s(num_sampled, model.head_params, ceilings)
    attention = decode_context * model.kv_bytes / ceilings.read_bytes_s
    attention += model.attention_flops(prefill_pairs) / ceilings.prefill_flop_s
    return {"gemm": gemm, "attention": attention}


@dataclasses.dataclass(slots=True)
class _Run:
    prompt_len: int
    output_len: int
    num_computed: int = 0
    num_output: int = 0


def offline_floor(
    requests: Iterable[tuple[int, int]],
    model: ModelShape,
    ceilings: Ceilings,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> tuple[float, int]:
    """Seconds and steps of continuous batching over all requests at once, memory unlimited.

    Decodes first, then unfinished prompts, then new ones in order, within the two limits.

    Args:
        requests: Prompt and output length of each.
        model: Sizes of the model.
        ceilings: Of the GPU.
        max_num_seqs: Sequences that run at once.
        max_num_batched_tokens: Tokens of a step.
    """
    waiting = deque(_Run(*lengths) for lengths in requests)
    running: list[_Run] = []
    seconds, num_steps = 0.0, 0
    while waiting or running:
        decodes = [run for run in running if run.num_computed == run.prompt_len]
        decode_context = sum(run.prompt_len + run.num_output for run in decodes)
        for run in decodes:
            run.num_output += 1
        left = max_num_batched_tokens - len(decodes)
        num_sampled, pairs = len(decodes), 0
        prefills = [run for run in running if run.num_computed < run.prompt_len]
        while left > 0:
            if prefills:
                run = prefills.pop(0)
            elif waiting and len(running) < max_num_seqs:
                run = waiting.popleft()
                running.append(run)
            else:
                break
            chunk = min(left, run.prompt_len - run.num_computed)
            run.num_computed += chunk
            left -= chunk
            pairs += visible_pairs(chunk, run.num_computed)
            if run.num_computed == run.prompt_len:
                run.num_output = 1
                num_sampled += 1
        parts = step_floor_s(
            model,
            ceilings,
            num_tokens=max_num_batched_tokens - left,
            num_sampled=num_sampled,
            decode_context=decode_context,
            prefill_pairs=pairs,
        )
        seconds += sum(parts.values())
        num_steps += 1
        running = [run for run in running if run.num_output < run.output_len]
    return seconds, num_steps
