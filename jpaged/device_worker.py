"""What an engine does on its devices: parameters, pools, sampler state, masks, swapped blocks.

Decides nothing. Each of its calls takes host arrays to compiled programs, in the order in which
they are made; so the hosts of an engine that runs on several, each with a worker of its own, stay
equal by making the same calls in the same order (`jpaged.multihost`).
"""

import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jpaged import memory, platform, sampler, structured_outputs
from jpaged.block_swapper import BlockSwapper
from jpaged.compile_plan import (
    CompilePlan,
    StepProgram,
    StepShape,
    largest_shape,
    step_shapes,
)
from jpaged.config import SchedulerConfig
from jpaged.engine_config import EngineConfig
from jpaged.models.loader import LoadedModel, load_model
from jpaged.models.sharding import make_mesh
from jpaged.pallas_kernels import KVCacheSpec, preferred_layout
from jpaged.step import StepFunction
from jpaged.token_masks import TokenMasks

Exchange = Callable[[str, Any], list[Any]]
"""Given what a figure is called and this host's: the figures of all hosts, by rank."""
Pairs = Sequence[tuple[int, int]]


def load(config: EngineConfig) -> tuple[LoadedModel, SchedulerConfig]:
    """The model of a config on this host's share of the devices, and the scheduler's budgets.

    Raises:
        ValueError: The model cannot be loaded, or the devices or budgets do not fit it.
    """
    platform.set_compilation_cache(config.compilation_cache_dir)
    size = config.tensor_parallel_size
    loaded = load_model(
        config.model,
        dtype=config.dtype,
        load_format=config.load_format,
        revision=config.revision,
        mesh=make_mesh(size, num_hosts=config.nnodes) if size > 1 else None,
    )
    return loaded, config.scheduler_config(
        jax.default_backend(), loaded.config.max_position_embeddings
    )


def _alone(_: str, value: Any) -> list[Any]:
    return [value]


class DeviceWorker:
    """One host's devices.

    Args:
        loaded: The model.
        config: What the user set.
        scheduler_config: The budgets.
        exchange: Asks the other hosts.
        on_copy_in: See `BlockSwapper`.

    Attributes:
        step: Lowers the step.
        plan: The compiled programs.
        shapes: Shapes of the steps.
        num_layers: Layers of the model, each with a pool.
        kv_spec: A device's share of a layer's pool.
        masks: How masks of structured output are sent.
        num_blocks: Blocks of the pool, the null block included.
        num_host_blocks: Blocks of the host pool.
        params: The weights.
        pools: The layers' block pools.
        state: The sampler's.
        swapper: Moves blocks to the host; None where nothing is swapped.

    Raises:
        ValueError: The pool cannot hold one sequence of `max_model_len` tokens, or `swap_space` is
            too small for a block or too large for the host, or hosts have different models.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        scheduler_config: SchedulerConfig,
        *,
        exchange: Exchange = _alone,
        on_copy_in: Callable[[int, float], None] | None = None,
    ) -> None:
        model = loaded.model
        self._max_model_len = scheduler_config.max_model_len
        self.num_layers = loaded.config.num_layers
        self._num_rows = scheduler_config.max_num_seqs
        self._vocab_size = vocab_size = loaded.config.vocab_size
        self._is_one_of_several = config.nnodes > 1
        self.kv_spec = KVCacheSpec(
            block_size=config.block_size,
            num_kv_heads=model.local_config.num_kv_heads,
            head_dim=model.config.head_dim,
            dtype=jnp.dtype(jnp.float8_e4m3fn if config.kv_cache_dtype == "fp8" else model.dtype),
            layout=preferred_layout(model.config.head_dim),
        )
        limit = config.max_logprobs
        self.max_logprobs = vocab_size if limit == -1 else min(limit, vocab_size)
        self.max_blocks_per_seq = -(-scheduler_config.max_model_len // config.block_size)
        self.shapes = step_shapes(
            scheduler_config.max_num_batched_tokens,
            scheduler_config.max_num_seqs,
            on_accelerator=jax.default_backend() != "cpu",
        )
        self.step = StepFunction(
            model,
            self.kv_spec,
            num_rows=self._num_rows,
            max_blocks_per_seq=self.max_blocks_per_seq,
            max_logprobs=self.max_logprobs,
            mesh=loaded.mesh,
        )
        self.masks = TokenMasks(self._num_rows, vocab_size, self.step.on_all)
        described = hashlib.sha256(f"{loaded.config} {model.dtype}".encode()).hexdigest()
        if len(set(exchange("model", described))) > 1:
            raise ValueError("model must have the same config and dtype on all hosts")
        # Before the pool is sized by what is left of the memory.
        self.params: Any = loaded.params
        self.state: Any = self._make_state()
        self.swapper: BlockSwapper | None = None
        self._size_pools(loaded, config, scheduler_config, exchange)
        self.pools = self._allocate_pools()
        if self.num_host_blocks:
            self.swapper = BlockSwapper(
                self._spec_of(model.tensor_parallel_size),
                num_layers=self.num_layers,
                num_blocks=self.num_blocks,
                num_host_blocks=self.num_host_blocks,
                on_copy_in=on_copy_in,
                sharding=self.step.pool_sharding,
            )
        has_masks = structured_outputs.is_available() and not config.skip_tokenizer_init
        # What the first host's requests may ask for is what all must compile.
        has_masks = exchange("structured output", has_masks)[0]
        self.plan = self._make_plan(config, has_masks)
        exchange("compiled programs", True)

    def _size_pools(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        scheduler_config: SchedulerConfig,
        exchange: Exchange,
    ) -> None:
        num_layers = self.num_layers
        beside = BlockSwapper.device_bytes(self.kv_spec, num_layers) if config.swaps else 0
        largest = largest_shape(self.shapes)
        devices = jax.local_devices()[:1] if loaded.mesh is None else loaded.mesh.local_devices
        num_blocks = memory.num_blocks(
            config,
            scheduler_config,
            self.kv_spec,
            num_layers=num_layers,
            step_temp_bytes=lambda blocks: self.step.temp_bytes(largest, blocks) + beside,
            devices=devices,
        )
        self.num_blocks: int = min(exchange("num_blocks", num_blocks))
        num_host_blocks = memory.num_host_blocks(
            config,
            self._spec_of(len(devices)),
            num_layers=num_layers,
            num_blocks=self.num_blocks,
        )
        self.num_host_blocks: int = min(exchange("num_host_blocks", num_host_blocks))

    def _spec_of(self, num_devices: int) -> KVCacheSpec:
        """One layer's blocks, the shares of several devices together."""
        num_kv_heads = num_devices * self.kv_spec.num_kv_heads
        return dataclasses.replace(self.kv_spec, num_kv_heads=num_kv_heads)

    def _allocate_pools(self) -> tuple[jax.Array, ...]:
        return tuple(self.step.allocate_pool(self.num_blocks) for _ in range(self.num_layers))

    def _make_state(self) -> sampler.SamplerState:
        def zeros() -> sampler.SamplerState:
            return sampler.SamplerState.zeros(self._num_rows, self._vocab_size)

        on_all = self.step.replicated
        # Made by a program: of an array of this host alone JAX would ask the other hosts first.
        return zeros() if on_all is None else jax.jit(zeros, out_shardings=on_all)()

    # Compilation.

    def _make_plan(self, config: EngineConfig, has_masks: bool) -> CompilePlan:
        self._lowering = threading.Lock()
        mask_programs = self.masks.programs() if has_masks else {}
        swap_programs = {} if self.swapper is None else self.swapper.programs()
        plan = CompilePlan(
            self.shapes,
            self._compile,
            num_threads=min(len(self.shapes), os.cpu_count() or 1, 8),
            strict=config.strict_compilation,
            others={"init_row": self._compile_init_row, **mask_programs, **swap_programs},
        )
        if config.compilation != "lazy":
            plan.start()
        if config.compilation == "eager":
            plan.wait()
        return plan

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

    # Calls: what hosts repeat.

    def prepare(self, program: StepProgram) -> None:
        """Returns when a step's program is compiled, now if it is not yet."""
        self.plan.require(program)

    def run(self, program: StepProgram, packed: NDArray[np.int32]) -> dict[str, Any]:
        """Starts a step and returns its outputs, which are still to come.

        Args:
            program: The step's, compiled.
            packed: Its batch (`InputBatch`).
        """
        self.pools, self.state, outputs = program.compiled(
            self.params, self.pools, self.state, packed
        )
        return outputs

    def init_row(
        self,
        row: int,
        num_prompt_tokens: int,
        only_listed: bool,
        token_ids: NDArray[np.int32],
        bias_token_ids: NDArray[np.int32],
        bias_values: NDArray[np.float32],
    ) -> None:
        """Gives a row of the sampler's state its sequence.

        Args:
            row: Which one.
            num_prompt_tokens: How many of the tokens are the prompt's.
            only_listed: Whether only tokens with a bias may be sampled.
            token_ids: The sequence's tokens so far.
            bias_token_ids: Tokens with a bias.
            bias_values: Their biases.
        """
        self.state = self.plan.get("init_row")(
            self.state,
            np.int32(row),
            _padded(token_ids, self._max_model_len, -1),
            np.int32(num_prompt_tokens),
            _padded(bias_token_ids, self._vocab_size, -1),
            _padded(bias_values, self._vocab_size, 0),
            np.bool_(only_listed),
        )

    def set_masks(self, rows: NDArray[np.int32], masks: NDArray[np.int32]) -> None:
        """Writes masks of allowed tokens, from `TokenMasks.fill`, into rows of the state."""
        assert self.state is not None, "the worker was shut down"
        allowed = self.masks.send(self.state.allowed, rows, masks, self.plan.get)
        self.state = dataclasses.replace(self.state, allowed=allowed)

    def swap(self, swap_outs: Pairs, swap_ins: Pairs) -> None:
        """Starts copies to the host and from there; see `BlockSwapper`."""
        assert self.swapper is not None, "swapped without a host pool"
        self.swapper.swap_out(self.pools, swap_outs, self.plan.get)
        self.pools = self.swapper.swap_in(self.pools, swap_ins, self.plan.get)

    def reset(self) -> None:
        """Makes the device's state valid again after a step that failed or was interrupted.

        Pools and state are donated to a step, so they may be lost with it; their content is not
        kept.
        """
        if self.swapper is not None:
            self.swapper.reset()
        try:
            jax.block_until_ready((self.pools, self.state))
        except RuntimeError:  # deleted, or the result of a step that failed
            self._renew()
        else:
            # What one host has lost the others must renew with it.
            if self._is_one_of_several:
                self._renew()

    def _renew(self) -> None:
        self.pools = ()
        self.pools = self._allocate_pools()
        self.state = self._make_state()

    def wait(self, outputs: dict[str, Any]) -> None:
        """Returns when a step's outputs can be read; nothing to do where reading them waits."""

    def shutdown(self) -> None:
        """Ends background compilation and lets go of the device's memory."""
        self.plan.stop()
        self.swapper = None
        self.pools = ()
        self.params = None
        self.state = None


def _padded(values: NDArray[Any], length: int, fill: int) -> NDArray[Any]:
    padded = np.full(length, fill, values.dtype)
    padded[: len(values)] = values
    return padded
