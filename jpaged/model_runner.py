"""From a scheduled step to its token ids: buffers, the jitted step, results read later.

Makes no scheduling decisions. Owns what lives on the device: parameters, block pools, sampler
state. `dispatch` returns before the step has run; its result is read through the handle it gives.
"""

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jpaged import memory, sampler, structured_outputs
from jpaged.block_swapper import BlockSwapper
from jpaged.compile_plan import CompilePlan, StepShape, step_shapes
from jpaged.config import SchedulerConfig
from jpaged.engine_config import EngineConfig
from jpaged.input_batch import InputBatch, packed_size
from jpaged.models.loader import LoadedModel
from jpaged.pallas_kernels import KVCacheSpec, preferred_layout
from jpaged.request import Sequence
from jpaged.sampling_rows import RequestSampling
from jpaged.scheduler_output import SchedulerOutput
from jpaged.step import StepFunction
from jpaged.token_masks import TokenMasks

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Log-probabilities of one position, in NumPy."""

    logprob: float
    rank: int
    top_token_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled, one entry a scheduled sequence; log-probabilities as arrays."""

    tokens: list[int]
    sampled: "_Logprobs"
    prompt: "_Logprobs | None"

    def logprobs(self, index: int) -> PositionLogprobs:
        """Of the token sampled for sequence `index` of the step."""
        return self.sampled.at(index)

    def prompt_logprobs(self, index: int) -> PositionLogprobs:
        """Of the prompt token that follows flat token `index` of the step."""
        assert self.prompt is not None, "the step computed no prompt log-probabilities"
        return self.prompt.at(index)


class _Logprobs:
    """Log-probabilities still on the device, read once when first asked for."""

    def __init__(self, arrays: Any) -> None:
        self._arrays = arrays
        self._host: Any = None

    def at(self, index: int) -> PositionLogprobs:
        if self._host is None:
            self._host = jax.device_get(self._arrays)
        host = self._host
        return PositionLogprobs(
            float(host.logprobs[index]),
            int(host.ranks[index]),
            host.top_token_ids[index],
            host.top_logprobs[index],
        )


class StepHandle:
    """A step that was dispatched; `result` waits for it.

    Attributes:
        scheduled: What runs.
        dispatched_s: When it was dispatched, on the clock `time.perf_counter`.
    """

    def __init__(
        self, scheduled: SchedulerOutput, outputs: dict[str, Any], dispatched_s: float
    ) -> None:
        self.scheduled = scheduled
        self.dispatched_s = dispatched_s
        self._outputs = outputs
        outputs["tokens"].copy_to_host_async()

    def result(self) -> StepResult:
        """The step's tokens, once it has run."""
        tokens = np.asarray(self._outputs["tokens"]).tolist()
        prompt = self._outputs.get("prompt")
        return StepResult(
            tokens,
            _Logprobs(self._outputs.get("sampled")),
            None if prompt is None else _Logprobs(prompt),
        )


class ModelRunner:
    """The device side of an engine.

    Args:
        loaded: The model.
        config: What the user set.
        scheduler_config: The budgets.
        on_copy_in: See `BlockSwapper`.

    Raises:
        ValueError: The pool cannot hold one sequence of `max_model_len` tokens, or `swap_space` is
            too small for a block or too large for the host.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        scheduler_config: SchedulerConfig,
        on_copy_in: Callable[[int, float], None] | None = None,
    ) -> None:
        model = loaded.model
        self._max_model_len = scheduler_config.max_model_len
        self._num_layers = loaded.config.num_layers
        self.kv_spec = KVCacheSpec(
            block_size=config.block_size,
            num_kv_heads=model.local_config.num_kv_heads,
            head_dim=model.config.head_dim,
            dtype=jnp.dtype(jnp.float8_e4m3fn if config.kv_cache_dtype == "fp8" else model.dtype),
            layout=preferred_layout(model.config.head_dim),
        )
        vocab_size = loaded.config.vocab_size
        limit = config.max_logprobs
        self.max_logprobs = vocab_size if limit == -1 else min(limit, vocab_size)
        self.max_blocks_per_seq = -(-scheduler_config.max_model_len // config.block_size)
        self._num_rows = scheduler_config.max_num_seqs
        shapes = step_shapes(
            scheduler_config.max_num_batched_tokens,
            scheduler_config.max_num_seqs,
            on_accelerator=jax.default_backend() != "cpu",
        )
        self._banning: list[RequestSampling | None] = [None] * self._num_rows
        self._wants_prompt = [False] * self._num_rows
        self._is_plain = [False] * self._num_rows
        self._vocab_size = vocab_size
        self.step = StepFunction(
            model,
            self.kv_spec,
            num_rows=self._num_rows,
            max_blocks_per_seq=self.max_blocks_per_seq,
            max_logprobs=self.max_logprobs,
            mesh=loaded.mesh,
        )
        self._masks = TokenMasks(self._num_rows, vocab_size, self.step.on_all)
        # Before the pool is sized by what is left of the memory.
        self._params = loaded.params
        self._state = self._make_state()
        num_layers = self._num_layers
        beside = BlockSwapper.device_bytes(self.kv_spec, num_layers) if config.swaps else 0
        largest = max(shapes, key=lambda s: (s.num_tokens, s.num_seqs, not s.plain))
        self.num_blocks = memory.num_blocks(
            config,
            scheduler_config,
            self.kv_spec,
            num_layers=num_layers,
            step_temp_bytes=lambda blocks: self.step.temp_bytes(largest, blocks) + beside,
            devices=jax.local_devices()[:1] if loaded.mesh is None else loaded.mesh.local_devices,
        )
        num_shares = model.tensor_parallel_size
        whole_spec = dataclasses.replace(
            self.kv_spec, num_kv_heads=num_shares * self.kv_spec.num_kv_heads
        )
        self.num_host_blocks = memory.num_host_blocks(
            config, whole_spec, num_layers=num_layers, num_blocks=self.num_blocks
        )
        self._pools = self._allocate_pools()
        self._swapper: BlockSwapper | None = None
        if self.num_host_blocks:
            self._swapper = BlockSwapper(
                whole_spec,
                num_layers=num_layers,
                num_blocks=self.num_blocks,
                num_host_blocks=self.num_host_blocks,
                on_copy_in=on_copy_in,
                sharding=self.step.pool_sharding,
            )
        self._batch = InputBatch(
            self._num_rows,
            self.max_blocks_per_seq,
            config.block_size,
            self.num_blocks,
            max(packed_size(shape, self.max_blocks_per_seq) for shape in shapes),
        )
        self._lowering = threading.Lock()
        has_masks = structured_outputs.is_available() and not config.skip_tokenizer_init
        mask_programs = self._masks.programs() if has_masks else {}
        swap_programs = {} if self._swapper is None else self._swapper.programs()
        self.plan = CompilePlan(
            shapes,
            self._compile,
            num_threads=min(len(shapes), os.cpu_count() or 1, 8),
            strict=config.strict_compilation,
            others={"init_row": self._compile_init_row, **mask_programs, **swap_programs},
        )
        if config.compilation != "lazy":
            self.plan.start()
        if config.compilation == "eager":
            self.plan.wait()

    def _allocate_pools(self) -> tuple[jax.Array, ...]:
        return tuple(self.step.allocate_pool(self.num_blocks) for _ in range(self._num_layers))

    def _make_state(self) -> sampler.SamplerState:
        state = sampler.SamplerState.zeros(self._num_rows, self._vocab_size)
        on_all = self.step.replicated
        return state if on_all is None else jax.device_put(state, on_all)

    # Compilation.

    def _compile(self, shape: StepShape) -> jax.stages.Compiled:
        # Tracing and lowering hold Python's lock: side by side, all would be through at the end.
        with self._lowering:
            lowered = self.step.lower(shape, self.num_blocks)
        return lowered.compile()

    def _compile_init_row(self) -> jax.stages.Compiled:
        def ints(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        args = (
            ints(),
            ints(self._max_model_len),
            ints(),
            ints(self._vocab_size),
            jax.ShapeDtypeStruct((self._vocab_size,), jnp.float32),
            jax.ShapeDtypeStruct((), jnp.bool_),
        )
        init_row = jax.jit(sampler.init_row, donate_argnums=0)
        return init_row.lower(self.step.abstract_state(), *self.step.on_all(args)).compile()

    # Rows.

    def admit(self, seq: Sequence, sampling: RequestSampling, prompt_logprobs: bool) -> None:
        """Gives a sequence's row its sampling parameters and, where needed, its state.

        Args:
            seq: A sequence that was given a row in the step about to be dispatched.
            sampling: Its request's parameters.
            prompt_logprobs: Whether log-probabilities of its prompt are wanted.
        """
        row = seq.row
        assert row is not None, f"{seq} was admitted without a row"
        self._batch.set_row(row, sampling.row(seq.seq_index))
        self._banning[row] = sampling if sampling.may_ban else None
        self._wants_prompt[row] = prompt_logprobs
        self._is_plain[row] = sampling.is_plain and not prompt_logprobs
        if not sampling.needs_state:
            return
        token_ids = np.full(self._max_model_len, -1, np.int32)
        token_ids[: len(seq.token_ids)] = seq.token_ids
        bias_token_ids = np.full(self._vocab_size, -1, np.int32)
        bias_values = np.zeros(self._vocab_size, np.float32)
        bias_token_ids[: len(sampling.bias_token_ids)] = sampling.bias_token_ids
        bias_values[: len(sampling.bias_values)] = sampling.bias_values
        self._state = self.plan.get("init_row")(
            self._state,
            np.int32(row),
            token_ids,
            np.int32(seq.num_prompt_tokens),
            bias_token_ids,
            bias_values,
            np.bool_(sampling.only_listed),
        )

    def set_masks(self, rows: list[int], fill: Callable[[NDArray[np.int32]], None]) -> None:
        """Sets the tokens that structured output allows next in some rows.

        Args:
            rows: Rows of running sequences.
            fill: Writes their masks, in that order, into an `int32[N, W]`.
        """
        assert self._state is not None, "the runner was shut down"
        allowed = self._masks.send(self._state.allowed, rows, fill, self.plan.get)
        self._state = dataclasses.replace(self._state, allowed=allowed)

    # Steps.

    def swap(self, scheduled: SchedulerOutput) -> None:
        """Starts a step's copies to the host and from there; goes before its `dispatch`."""
        assert self._swapper is not None, "swapped without a host pool"
        self._swapper.swap_out(self._pools, scheduled.swap_outs, self.plan.get)
        self._pools = self._swapper.swap_in(self._pools, scheduled.swap_ins, self.plan.get)

    def dispatch(self, scheduled: SchedulerOutput) -> StepHandle:
        """Starts a step and returns at once."""
        num_seqs = len(scheduled.seqs)
        decode_only = scheduled.num_decodes == num_seqs and not self._needs_prompt(scheduled)
        plain = not scheduled.block_copies and all(map(self._asks_nothing_else, scheduled.seqs))
        program = self.plan.find(scheduled.num_batched_tokens, num_seqs, decode_only, plain)
        packed = self._batch.fill(
            scheduled, program.shape, self._bans_of, self._wants_prompt_logprobs
        )
        start = time.perf_counter()
        self._pools, self._state, outputs = program.compiled(
            self._params, self._pools, self._state, packed
        )
        return StepHandle(scheduled, outputs, start)

    def _bans_of(self, seq: Sequence) -> Any:
        assert seq.row is not None, f"{seq} is scheduled without a row"
        sampling = self._banning[seq.row]
        if sampling is None:
            return ()
        # The scheduler has counted the token that this step samples as pending already.
        return sampling.bans(seq.output_token_ids, seq.num_pending - 1)

    def _wants_prompt_logprobs(self, seq: Sequence) -> bool:
        assert seq.row is not None, f"{seq} is scheduled without a row"
        return self._wants_prompt[seq.row]

    def _asks_nothing_else(self, seq: Sequence) -> bool:
        assert seq.row is not None, f"{seq} is scheduled without a row"
        return self._is_plain[seq.row]

    def _needs_prompt(self, scheduled: SchedulerOutput) -> bool:
        """Whether log-probabilities of a prompt are wanted, which decode programs leave out."""
        return any(self._wants_prompt) and any(
            start + 1 < seq.num_prompt_tokens and self._wants_prompt_logprobs(seq)
            for seq, start in zip(scheduled.seqs, scheduled.starts, strict=True)
        )

    def reset(self) -> None:
        """Makes the device's state valid again after a step that failed or was interrupted.

        Pools and state are donated to a step, so they may be lost with it; their content is not
        kept.
        """
        if self._swapper is not None:
            self._swapper.reset()
        try:
            jax.block_until_ready((self._pools, self._state))
        except RuntimeError:  # deleted, or the result of a step that failed
            self._pools = ()
            self._pools = self._allocate_pools()
            self._state = self._make_state()

    def shutdown(self) -> None:
        """Ends background compilation and lets go of the device's memory."""
        self.plan.stop()
        self._swapper = None
        self._pools = ()
        self._params = None
        self._state = None
