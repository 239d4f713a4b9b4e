"""Compiles whole steps of the engine for TPUs that are not there, and says what the compiler says.

    python -m benchmarks.tpu_steps --json benchmarks/results/tpu_steps.json [--only llama-3-70b]

A step that decodes a full batch and the largest mixed step, of the small model each plain and with
the full sampler, through the code that the engine and `jpaged plan` use. Needs the package `libtpu`
and no TPU.
"""

import argparse
import dataclasses
import datetime
import os
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import common
from jpaged.compile_plan import StepShape, largest_shape, step_shapes
from jpaged.engine_config import EngineConfig
from jpaged.models.config import ModelConfig
from jpaged.models.sharding import local_config
from jpaged.models.sources import DEFAULT_MODEL
from jpaged.plan import estimate
from jpaged.plan.compile_target import Compiled
from jpaged.plan.compiler import compile_job
from jpaged.plan.models import read_model
from jpaged.plan.planner import most_shares, step_job
from jpaged.plan.targets import GIB, MIB, Target, parse_target

# The smallest slices that can be named: of v5p and tpu7x they have 4 chips.
ONE_CHIP = ("v5e-1", "v5p-8", "v6e-1", "tpu7x-8")
EIGHT_CHIPS = ("v5e-8", "v5p-16", "v6e-8", "tpu7x-16")
MAX_MODEL_LEN = 8192


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a machine.

    Attributes:
        model: As `jpaged plan` takes it.
        target: As `jpaged plan` takes it.
        num_devices: Devices that share the model; None: as many of the target as can.
        shapes: Which steps are compiled, of `decode` and `mixed`, each plain or with the full
            sampler.
    """

    model: str
    target: str
    num_devices: int | None = None
    shapes: tuple[tuple[str, bool], ...] = (
        ("decode", True),
        ("decode", False),
        ("mixed", True),
        ("mixed", False),
    )


def cases() -> Iterator[Case]:
    """What has to compile, large models first: they are the likelier ones to fail."""
    # Of large models the two steps that `jpaged plan` compiles.
    large = (("decode", True), ("mixed", False))
    yield Case("llama-3.1-405b", "v5p:4x4x4", shapes=large)
    for model in ("llama-3-70b", "llama-3-8b"):
        for target in EIGHT_CHIPS:
            yield Case(model, target, shapes=large)
    for target in ONE_CHIP:
        yield Case("llama-3-8b", target, num_devices=1, shapes=large)
    for target in ONE_CHIP:
        yield Case(DEFAULT_MODEL, target, num_devices=1)


def compile_case(case: Case) -> Iterator[dict[str, Any]]:
    """Compiles the steps of a case one after the other."""
    config, target = read_model(case.model), parse_target(case.target)
    longest = min(MAX_MODEL_LEN, config.max_position_embeddings)
    options = EngineConfig.from_options(model=case.model, max_model_len=longest)
    size = case.num_devices or most_shares(config, target.num_devices)
    scheduler = options.scheduler_config("tpu", config.max_position_embeddings)
    largest = largest_shape(
        step_shapes(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, on_accelerator=True)
    )
    decode = StepShape(scheduler.max_num_seqs, scheduler.max_num_seqs, True)
    num_blocks = _num_blocks(options, config, target, size)
    for kind, plain in case.shapes:
        shape = dataclasses.replace(largest if kind == "mixed" else decode, plain=plain)
        compiled = compile_job(step_job(options, config, target, size, shape, num_blocks))
        yield {
            "model": case.model,
            "target": case.target,
            "num_devices": size,
            "step": shape.name,
            "num_layers": config.num_layers,
            "num_blocks": num_blocks,
            "memory_bytes": target.device.memory_bytes,
            "xla_ms": compiled.cycles / target.device.clock_hz * 1e3,
            "load": round(os.getloadavg()[0], 1),  # of this machine: what seconds are worth
            "compiled": dataclasses.asdict(compiled),
        }


def _num_blocks(options: EngineConfig, config: ModelConfig, target: Target, size: int) -> int:
    """A pool of half of what weights and the sampler's state leave, or of one long sequence.

    So large that a step that copied it would be seen.
    """
    scheduler = options.scheduler_config("tpu", config.max_position_embeddings)
    share = local_config(config, size)
    left = int(target.device.memory_bytes * options.memory_utilization)
    left -= estimate.weight_bytes(share, 2) + estimate.state_bytes(config, scheduler.max_num_seqs)
    of_seq = -(-scheduler.max_model_len // options.block_size)
    blocks = left // 2 // estimate.block_bytes(share, 2, options.block_size)
    return min(max(blocks, of_seq + 1), of_seq * scheduler.max_num_seqs + 1)


def is_in_place(compiled: Compiled) -> bool:
    """Whether a step updates its pools in place: all aliased, and no room for a copy of half."""
    return (
        compiled.alias_bytes >= compiled.pool_bytes
        and compiled.temp_bytes < compiled.pool_bytes / 2
    )


def row(result: dict[str, Any]) -> list[Any]:
    """A result as a row of the table."""
    compiled = Compiled(**result["compiled"])
    start = [result["model"], result["target"], result["num_devices"], result["step"]]
    seconds = (compiled.lower_s, compiled.compile_s, compiled.compile_cpu_s)
    times = [f"{value:.1f}" for value in seconds]
    if compiled.error:
        return [*start, *times, *[""] * 7, compiled.error]
    return [
        *start,
        *times,
        f"{compiled.argument_bytes / GIB:.2f}",
        f"{compiled.temp_bytes / GIB:.2f}",
        f"{compiled.output_bytes / GIB:.2f}",
        f"{result['memory_bytes'] / GIB:.2f}",
        "yes" if is_in_place(compiled) else "no",
        f"{compiled.kernel_vmem_bytes / MIB:.0f}",
        f"{result['xla_ms']:.2f}",
        ", ".join(
            f"{count} {name}" for name, count in (compiled.kernels | compiled.collectives).items()
        ),
    ]


HEADER = (
    "model",
    "target",
    "devices",
    "step",
    "lower s",
    "compile s",
    "CPU s",
    "arguments",
    "temp",
    "output",
    "of GiB",
    "in place",
    "VMEM MiB",
    "XLA ms",
    "kernels and collectives",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", nargs="*", help="names of models or targets; all if left out")
    common.add_output_argument(parser)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the compiler is another process's
    steps = []
    results = {"date": datetime.date.today().isoformat(), "steps": steps}
    for case in cases():
        if arguments.only and not {case.model, case.target} & set(arguments.only):
            continue
        for result in compile_case(case):
            steps.append(result)
            print(*row(result), sep="  ", flush=True)
            common.write(results, arguments.json)
    common.print_table(HEADER, [row(result) for result in steps])


if __name__ == "__main__":
    main()
