"""Whether a model fits a machine, with how many blocks, and how fast a step should be there.

For TPUs the engine's largest step is compiled as the engine compiles it to size its pool, and then
the decode step of the batch that fits, with that pool. For GPUs nothing is compiled.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from jpaged.compile_plan import StepShape, largest_shape, step_shapes
from jpaged.config import SchedulerConfig, check_at_least
from jpaged.engine_config import EngineConfig
from jpaged.models.config import ModelConfig
from jpaged.models.sharding import local_config
from jpaged.plan import estimate
from jpaged.plan.compile_target import Compiled, Job
from jpaged.plan.compiler import Compilers, check_installed
from jpaged.plan.estimate import StepTime, Work
from jpaged.plan.models import read_model
from jpaged.plan.targets import GIB, Target, parse_target, siblings

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
DEFAULT_CONTEXT_LEN = 1024


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepEstimate:
    """How long a step should take.

    Attributes:
        num_tokens: Tokens that it computes.
        roofline_s: By the model of `plan.estimate`.
        compiler_s: By the compiler's cycles, with the roofline's attention and links; None where
            nothing was compiled.
        bound: What most of the roofline is bound by.
    """

    num_tokens: int
    roofline_s: float
    compiler_s: float | None
    bound: str

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.roofline_s, self.compiler_s or 0.0)

    @property
    def source(self) -> str:
        """Which of the two that is."""
        return "roofline" if self.seconds == self.roofline_s else "compiler"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TargetPlan:
    """What a model would be on one target; bytes are a device's.

    Attributes:
        target: The machine.
        tensor_parallel_size: Devices that share the model.
        replicas: Servers of that size that the machine holds.
        budget_bytes: What `memory_utilization` leaves of the memory.
        weight_bytes: Of the weights.
        state_bytes: Of the sampler's state and of a step's inputs.
        temp_bytes: Of the largest step, beside its arguments.
        block_bytes: Of a block, all layers.
        num_blocks: Of the pool, the null block included; 0 if the model does not fit.
        num_seqs_fit: Sequences of `context_len` tokens that the pool holds.
        decode: A step of as many of them as run at once; None if the model does not fit.
        prefill: A step full of prompts; None if the model does not fit.
        why_not: Why the model does not fit and what would help; empty if it does.
        notes: What else should be known.
        compile_s: Seconds that the compiler took.
    """

    target: Target
    tensor_parallel_size: int
    replicas: int
    budget_bytes: int
    weight_bytes: int
    state_bytes: int
    temp_bytes: int
    block_bytes: int
    num_blocks: int = 0
    num_seqs_fit: int = 0
    decode: StepEstimate | None = None
    prefill: StepEstimate | None = None
    why_not: str = ""
    notes: tuple[str, ...] = ()
    compile_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Plans of several targets with the same options.

    Attributes:
        model: As it was asked for.
        config: Its shape.
        options: What was set of the engine.
        context_len: Tokens that a sequence has, on average.
        targets: One a target, in the order asked for.
    """

    model: str
    config: ModelConfig
    options: EngineConfig
    context_len: int
    targets: tuple[TargetPlan, ...]

    def scheduler_config(self, target: Target) -> SchedulerConfig:
        """The budgets of an engine there."""
        return self.options.scheduler_config(
            target.device.platform, self.config.max_position_embeddings
        )


def make_plan(
    model: str | None,
    targets: Sequence[str],
    *,
    context_len: int | None = None,
    report_progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Plan:
    """Plans a model for some targets.

    Args:
        model: As `plan.models.read_model` takes it.
        targets: As `plan.targets.parse_target` takes them.
        context_len: Tokens of a sequence on average; 1,024 if None, or the longest sequence.
        report_progress: Told what is under way; from several threads.
        options: Of `EngineConfig`.

    Raises:
        ValueError: A target, a model or an option that does not exist or is not allowed.
        RuntimeError: The TPU compiler is not installed, or failed.
    """
    machines = [parse_target(name) for name in dict.fromkeys(targets)]
    engine_options = EngineConfig.from_options(model=model, **options)
    config = read_model(model)
    longest = engine_options.scheduler_config("tpu", config.max_position_embeddings).max_model_len
    if context_len is None:
        context_len = min(DEFAULT_CONTEXT_LEN, longest)
    check_at_least("context_len", context_len, 1)
    if context_len > longest:
        raise ValueError(f"context_len must be at most max_model_len={longest}, got {context_len}")
    if any(machine.device.platform == "tpu" for machine in machines):
        check_installed()
    # Compiling for faster chips takes longer, so they come first: what is last should be short.
    by_cost = sorted(machines, key=lambda machine: -machine.device.matmul_flop_s)
    with (
        contextlib.closing(Compilers()) as compilers,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool,
    ):
        planner = _Planner(config, engine_options, context_len, compilers.compile, report_progress)
        try:
            # Large steps first, so that at the end no core waits for another's.
            sized = {pool.submit(planner.size, machine): machine for machine in by_cost}
            timed = {
                sized[done]: pool.submit(planner.time, done.result())
                for done in concurrent.futures.as_completed(sized)
            }
            plans = tuple(timed[machine].result() for machine in machines)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Plan(
        model=model or "the embedded model",
        config=config,
        options=engine_options,
        context_len=context_len,
        targets=plans,
    )


def step_job(
    options: EngineConfig,
    config: ModelConfig,
    target: Target,
    tensor_parallel_size: int,
    shape: StepShape,
    num_blocks: int,
) -> Job:
    """The engine's step of a shape, to be compiled for a TPU target.

    Args:
        options: Of the engine; `options.model` is what the compiling process reads.
        config: That model's.
        target: The machine.
        tensor_parallel_size: Devices of it that share the model.
        shape: The step's.
        num_blocks: Blocks of the pool.
    """
    scheduler = options.scheduler_config(target.device.platform, config.max_position_embeddings)
    limit, vocab_size = options.max_logprobs, config.vocab_size
    return Job(
        topology_name=target.topology_name,
        accelerator_type=target.accelerator_type,
        model=options.model,
        dtype=_dtype(options, target),
        tensor_parallel_size=tensor_parallel_size,
        block_size=options.block_size,
        num_blocks=num_blocks,
        max_model_len=scheduler.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_logprobs=vocab_size if limit == -1 else min(limit, vocab_size),
        num_tokens=shape.num_tokens,
        num_seqs=shape.num_seqs,
        decode_only=shape.decode_only,
        plain=shape.plain,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Sized:
    """A plan whose memory is settled, and the cycles of its largest step where it was compiled."""

    plan: TargetPlan
    mixed_cycles: int | None = None


class _Planner:
    def __init__(
        self,
        config: ModelConfig,
        options: EngineConfig,
        context_len: int,
        compile_job: Callable[[Job], Compiled],
        report_progress: Callable[[str], None],
    ) -> None:
        self._config = config
        self._options = options
        self._context_len = context_len
        self._compile_job = compile_job
        self._report = report_progress
        self._reporting = threading.Lock()

    def size(self, target: Target) -> _Sized:
        """The plan of one target but for its speed."""
        bare = self._by_arithmetic(target)
        bare = dataclasses.replace(bare, notes=self._notes(bare))
        if target.device.platform == "gpu":
            return _Sized(self._with_blocks(bare))
        # What does not fit by far is not worth a minute of compilation.
        if bare.weight_bytes + bare.state_bytes + bare.block_bytes > bare.budget_bytes:
            return _Sized(dataclasses.replace(bare, temp_bytes=0, why_not=self._why_not(bare)))
        # As the engine does, which sizes its pool by this one.
        largest = largest_shape(self._shapes(target))
        mixed = self._compile(bare, largest, self._least_blocks(self._scheduler_config(target)))
        if mixed.error:
            why_not = f"the compiler refuses {largest.name}: {mixed.error}"
            return _Sized(dataclasses.replace(bare, why_not=why_not))
        plan = dataclasses.replace(
            bare,
            weight_bytes=mixed.weight_bytes,
            state_bytes=mixed.argument_bytes - mixed.pool_bytes - mixed.weight_bytes,
            temp_bytes=mixed.temp_bytes,
            compile_s=mixed.compile_s,
        )
        return _Sized(self._with_blocks(plan), mixed.cycles)

    def time(self, sized: _Sized) -> TargetPlan:
        """The plan of a target, its speed included if the model fits."""
        plan = sized.plan
        if not plan.num_blocks:
            return plan
        if sized.mixed_cycles is None:
            return self._with_speed(plan)
        batch = min(plan.num_seqs_fit, self._scheduler_config(plan.target).max_num_seqs)
        decodes = [
            s
            for s in self._shapes(plan.target)
            if s.decode_only and s.plain and s.num_seqs >= batch
        ]
        shape = min(decodes, key=lambda s: s.num_seqs)
        decode = self._compile(plan, shape, plan.num_blocks)
        if decode.error:
            return dataclasses.replace(
                plan, num_blocks=0, why_not=f"the compiler refuses {shape.name}: {decode.error}"
            )
        plan = self._with_speed(plan, decode.cycles, sized.mixed_cycles)
        return dataclasses.replace(plan, compile_s=plan.compile_s + decode.compile_s)

    def _shapes(self, target: Target) -> tuple[StepShape, ...]:
        scheduler = self._scheduler_config(target)
        return step_shapes(
            scheduler.max_num_batched_tokens, scheduler.max_num_seqs, on_accelerator=True
        )

    def _by_arithmetic(self, target: Target) -> TargetPlan:
        """What can be said without a compiler: weights, state, blocks; temp by the GPUs' rule."""
        config, scheduler = self._config, self._scheduler_config(target)
        size = most_shares(config, target.num_devices)
        share = local_config(config, size)
        itemsize = ITEMSIZE[_dtype(self._options, target)]
        return TargetPlan(
            target=target,
            tensor_parallel_size=size,
            replicas=target.num_devices // size,
            budget_bytes=int(target.device.memory_bytes * self._options.memory_utilization),
            weight_bytes=estimate.weight_bytes(share, itemsize),
            state_bytes=estimate.state_bytes(config, scheduler.max_num_seqs),
            temp_bytes=estimate.gpu_temp_bytes(
                share,
                config.vocab_size,
                itemsize,
                scheduler.max_num_batched_tokens,
                estimate.own_rows(scheduler.max_num_seqs, size),
            ),
            block_bytes=estimate.block_bytes(share, itemsize, self._options.block_size),
        )

    def _compile(self, plan: TargetPlan, shape: StepShape, num_blocks: int) -> Compiled:
        with self._reporting:
            self._report(f"{plan.target.name}: compiling {shape.name}")
        return self._compile_job(
            step_job(
                self._options,
                self._config,
                plan.target,
                plan.tensor_parallel_size,
                shape,
                num_blocks,
            )
        )

    def _with_blocks(self, plan: TargetPlan) -> TargetPlan:
        """The plan with the blocks that are left, as `jpaged.memory` counts them."""
        scheduler = self._scheduler_config(plan.target)
        least = self._least_blocks(scheduler)
        left = plan.budget_bytes - plan.weight_bytes - plan.state_bytes - plan.temp_bytes
        # More than every sequence at full length can never be used.
        most = (least - 1) * scheduler.max_num_seqs + 1
        blocks = min(max(left // plan.block_bytes, 0), most)
        if blocks < least:
            return dataclasses.replace(plan, why_not=self._why_not(plan))
        of_seq = -(-self._context_len // self._options.block_size)
        return dataclasses.replace(plan, num_blocks=blocks, num_seqs_fit=(blocks - 1) // of_seq)

    def _with_speed(
        self, plan: TargetPlan, decode_cycles: int | None = None, mixed_cycles: int | None = None
    ) -> TargetPlan:
        scheduler = self._scheduler_config(plan.target)
        batch = min(plan.num_seqs_fit, scheduler.max_num_seqs)
        prompt = max(min(self._context_len, scheduler.max_model_len - 1), 1)
        decode = estimate.decode_work(batch, self._context_len)
        prefill = estimate.prefill_work(scheduler.max_num_batched_tokens, prompt)
        return dataclasses.replace(
            plan,
            decode=self._step(plan, decode, decode_cycles),
            prefill=self._step(plan, prefill, mixed_cycles),
        )

    def _step(self, plan: TargetPlan, work: Work, cycles: int | None) -> StepEstimate:
        device = plan.target.device
        itemsize = ITEMSIZE[_dtype(self._options, plan.target)]
        time: StepTime = estimate.step_time(
            self._config, device, itemsize, plan.tensor_parallel_size, work
        )
        compiler_s = None
        if cycles is not None:
            # Kernels and links carry no cycles.
            compiler_s = cycles / device.clock_hz + time.of("attention", "links")
        return StepEstimate(
            num_tokens=work.num_tokens,
            roofline_s=time.seconds,
            compiler_s=compiler_s,
            bound=device.bound_name(time.bound),
        )

    def _why_not(self, plan: TargetPlan) -> str:
        scheduler = self._scheduler_config(plan.target)
        fixed = plan.weight_bytes + plan.state_bytes + plan.temp_bytes
        needs = fixed + self._least_blocks(scheduler) * plan.block_bytes
        share = self._options.memory_utilization
        text = (
            f"needs {needs / GIB:.2f} GiB a device for one sequence of {scheduler.max_model_len} "
            f"tokens, has {plan.budget_bytes / GIB:.2f} ({share:g} of "
            f"{plan.target.device.memory_bytes / GIB:.2f})"
        )
        helps = []
        blocks = (plan.budget_bytes - fixed) // plan.block_bytes - 1
        if blocks > 0:
            helps.append(f"--max-model-len {blocks * self._options.block_size}")
        for name in siblings(plan.target):
            other = self._by_arithmetic(parse_target(name))
            if other.target.num_devices > plan.target.num_devices and self._fits(other):
                helps.append(f"--target {name}")
                break
        return f"{text}; {' or '.join(helps)} should do" if helps else text

    def _fits(self, plan: TargetPlan) -> bool:
        least = self._least_blocks(self._scheduler_config(plan.target)) * plan.block_bytes
        return plan.weight_bytes + plan.state_bytes + plan.temp_bytes + least <= plan.budget_bytes

    def _notes(self, plan: TargetPlan) -> tuple[str, ...]:
        target, notes = plan.target, []
        if plan.replicas > 1:
            notes.append(
                f"the model is cut over {plan.tensor_parallel_size} of {target.num_devices} "
                f"devices: {plan.replicas} servers; sequences and tokens/s are of all of them"
            )
        if target.num_hosts > 1:
            notes.append(_hosts_note(plan))
        if not target.device.has_kernels:
            notes.append("attention runs in plain XLA there, far slower than assumed")
        if target.device.platform == "tpu" and self._config.head_dim not in (64, 128, 256):
            notes.append(
                f"no TPU kernel serves head_dim {self._config.head_dim}: attention runs in plain "
                "XLA, slower than assumed"
            )
        return tuple(notes)

    def _least_blocks(self, scheduler: SchedulerConfig) -> int:
        """One sequence of full length, and the null block."""
        return -(-scheduler.max_model_len // self._options.block_size) + 1

    def _scheduler_config(self, target: Target) -> SchedulerConfig:
        return self._options.scheduler_config(
            target.device.platform, self._config.max_position_embeddings
        )


def _dtype(options: EngineConfig, target: Target) -> str:
    return target.device.dtype if options.dtype == "auto" else options.dtype


def _hosts_note(plan: TargetPlan) -> str:
    num_hosts = plan.target.num_hosts
    if plan.replicas > 1:
        return (
            f"{num_hosts} hosts: one slice runs one server, so these {plan.replicas} need as many "
            "smaller slices"
        )
    where = "" if plan.target.device.platform == "tpu" else " --node-rank R --master-addr A"
    return f"{num_hosts} hosts: every one runs the same command, with --nnodes {num_hosts}{where}"


def most_shares(config: ModelConfig, num_devices: int) -> int:
    """The most devices of a machine that the model can be cut over evenly."""
    for size in range(num_devices, 1, -1):
        if num_devices % size:
            continue
        try:
            local_config(config, size)
        except ValueError:
            continue
        return size
    return 1
