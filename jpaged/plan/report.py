"""A plan as a table with what follows from it, or as one JSON object."""

import dataclasses
import shlex
from typing import Any

from jpaged.plan.planner import Plan, StepEstimate, TargetPlan
from jpaged.plan.targets import GIB

_HEADER = (
    "target",
    "devices",
    "fits",
    "weights",
    "state",
    "temp",
    "blocks",
    "seqs",
    "decode ms",
    "by",
    "bound",
    "tokens/s",
    "prefill tok/s",
)
_LEFT = {"target", "fits", "by", "bound"}
_LEGEND = """\
weights, state (of the sampler), temp: GiB a device; blocks: of {block_size} tokens; seqs: of
{context_len} tokens, as many as the blocks hold. decode: a step of as many of them as run at once.
by: which is longer, and so shown, the roofline or the compiler's own estimate of cycles; bound: of
the roofline. Memory of TPUs is the compiler's figure; memory of GPUs and all speeds are estimates.
Nothing was measured there.
"""


def render(plan: Plan) -> str:
    """The plan as text for a person."""
    config = plan.config
    lines = [
        f"{plan.model}: {config.architecture}, {config.num_layers} layers, sequences of up to "
        f"{plan.options.max_model_len or config.max_position_embeddings} tokens, "
        f"{plan.context_len} on average",
        "",
        *_table([_row(target) for target in plan.targets]),
        "",
        _LEGEND.format(block_size=plan.options.block_size, context_len=plan.context_len),
    ]
    for target in plan.targets:
        name = target.target.name
        if target.why_not:
            lines.append(f"{name}: does not fit: {target.why_not}")
        else:
            lines.append(f"{name}: {command(plan, target)}")
        lines += [f"  {note}" for note in target.notes]
    return "\n".join(lines) + "\n"


def command(plan: Plan, target: TargetPlan) -> str:
    """The server's command line that the figures of a target hold for."""
    scheduler = plan.scheduler_config(target.target)
    words = ["jpaged", "serve"]
    if plan.options.model is not None:
        words += ["--model", plan.options.model]
    if target.tensor_parallel_size > 1:
        words += ["--tensor-parallel-size", str(target.tensor_parallel_size)]
    if target.target.num_hosts > 1 and target.replicas == 1:
        words += ["--nnodes", str(target.target.num_hosts)]
    if plan.options.dtype != "auto":
        words += ["--dtype", plan.options.dtype]
    words += [
        "--max-model-len",
        str(scheduler.max_model_len),
        "--max-num-seqs",
        str(scheduler.max_num_seqs),
        "--max-num-batched-tokens",
        str(scheduler.max_num_batched_tokens),
        "--block-size",
        str(plan.options.block_size),
        "--memory-utilization",
        f"{plan.options.memory_utilization:g}",
    ]
    return shlex.join(words)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values."""
    return {
        "model": plan.model,
        "context_len": plan.context_len,
        "targets": [_target_json(plan, target) for target in plan.targets],
    }


def _target_json(plan: Plan, target: TargetPlan) -> dict[str, Any]:
    machine = target.target
    values = dataclasses.asdict(target)
    return {
        "target": machine.name,
        "num_devices": machine.num_devices,
        "memory_bytes": machine.device.memory_bytes,
        **{k: v for k, v in values.items() if k not in ("target", "decode", "prefill")},
        "decode": _step_json(target, target.decode),
        "prefill": _step_json(target, target.prefill),
        "command": "" if target.why_not else command(plan, target),
    }


def _step_json(target: TargetPlan, step: StepEstimate | None) -> dict[str, Any] | None:
    if step is None:
        return None
    return dataclasses.asdict(step) | {
        "seconds": step.seconds,
        "source": step.source,
        "tokens_s": tokens_s(target, step),
    }


def tokens_s(target: TargetPlan, step: StepEstimate) -> float:
    """Tokens a second of all servers of a machine."""
    return target.replicas * step.num_tokens / step.seconds


def _row(plan: TargetPlan) -> list[str]:
    size, count = plan.tensor_parallel_size, plan.target.num_devices
    row = [
        plan.target.name,
        str(count) if size == count else f"{plan.replicas} x {size}",
        "no" if plan.why_not else "yes",
        f"{plan.weight_bytes / GIB:.2f}",
        f"{plan.state_bytes / GIB:.2f}",
        f"{plan.temp_bytes / GIB:.2f}" if plan.temp_bytes else "",
    ]
    if plan.decode is None or plan.prefill is None:
        return row + [""] * (len(_HEADER) - len(row))
    return [
        *row,
        str(plan.num_blocks),
        str(plan.replicas * plan.num_seqs_fit),
        f"{plan.decode.seconds * 1e3:.2f}",
        plan.decode.source,
        plan.decode.bound,
        f"{tokens_s(plan, plan.decode):.0f}",
        f"{tokens_s(plan, plan.prefill):.0f}",
    ]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    lines = []
    for row in (list(_HEADER), *rows):
        cells = [
            cell.ljust(width) if name in _LEFT else cell.rjust(width)
            for name, cell, width in zip(_HEADER, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
