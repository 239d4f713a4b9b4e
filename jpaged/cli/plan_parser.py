"""The arguments of `jpaged plan`.

Like those of the engine, an option left out stays None; they are a part of its options, since
nothing runs.
"""

import argparse

from jpaged.plan.shapes import SHAPES
from jpaged.plan.targets import DEFAULT_TARGETS

PLAN_EXAMPLES = """\
targets:
  v5e-8, v6e-8    TPUs by chips: 1, 4, 8, ... 256
  v5p-8, tpu7x-8  TPUs by cores, two a chip: 8, 16, 32, ... 1024
  v5p:4x4x4       TPUs by topology, in chips
  h200, h100, a100-80, a100-40, l4, t4, and -2 to -8 of them: h200-8

examples:
  jpaged plan --model llama-3-8b --target v6e-8
  jpaged plan --model ./my-checkpoint --target v5e-8,v5p-8,h200
  jpaged plan --model qwen3-32b --target v6e-8 --max-model-len 16384

For TPUs the engine's own steps are compiled, half a minute a target; that needs
no TPU but the TPU compiler: pip install libtpu. For GPUs nothing is compiled.
docs/plan.md says what the figures are and what they leave out."""


def add_plan_arguments(command: argparse.ArgumentParser, prefix: str) -> None:
    """Adds everything but `--debug`.

    Args:
        command: The parser of the command.
        prefix: Of the names of what goes to the engine's options.
    """
    command.add_argument(
        "-m",
        "--model",
        dest=f"{prefix}model",
        metavar="MODEL",
        help="a directory, a .gguf file, a config.json, a hub id (only its config is fetched) or "
        f"a shape: {', '.join(SHAPES)} (default: the embedded SmolLM2-135M-Instruct)",
    )
    command.add_argument(
        "-t",
        "--target",
        action="append",
        metavar="NAME,...",
        help=f"machines to plan for; may be repeated (default: {','.join(DEFAULT_TARGETS)})",
    )
    command.add_argument(
        "--context-len",
        type=int,
        metavar="N",
        help="tokens that a sequence has on average (default: 1024, or the longest if less)",
    )

    def add(flag: str, text: str, **options) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        command.add_argument(flag, dest=prefix + name, help=text, **options)

    add("--dtype", "auto, float32, bfloat16 or float16 (default: auto)", metavar="DTYPE")
    add(
        "--max-model-len",
        "most tokens of a sequence (default: the model's limit)",
        type=int,
        metavar="N",
    )
    add("--max-num-seqs", "most sequences at once (default: by device)", type=int, metavar="N")
    add(
        "--max-num-batched-tokens",
        "most tokens of one step (default: by device)",
        type=int,
        metavar="N",
    )
    add("--block-size", "tokens of a KV block (default: 16)", type=int, metavar="N")
    add(
        "--memory-utilization",
        "share of the accelerator's memory to use (default: 0.9)",
        type=float,
        metavar="X",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
