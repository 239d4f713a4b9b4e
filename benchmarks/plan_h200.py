"""What `jpaged plan` says of an H200 beside what was measured there; nothing is run.

    python -m benchmarks.plan_h200 [--json FILE]

Reads benchmarks/results/step_h200.json, step_many_rows_h200.json (decode steps, wall time) and
throughput_azure_conv_h200.json (blocks of the pool). The fixed cost of a layer was taken from the
first two rows; the others were not used.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import common
from jpaged.plan import estimate
from jpaged.plan.models import read_model
from jpaged.plan.targets import parse_target

RESULTS = Path(__file__).parent / "results"
STEPS = ("step_h200.json", "step_many_rows_h200.json")
POOL = "throughput_azure_conv_h200.json"


def step_rows() -> list[dict[str, Any]]:
    """Each measured decode step with its prediction."""
    config, device = read_model("llama-3-8b"), parse_target("h200").device
    rows = []
    for file in STEPS:
        for batch in json.loads((RESULTS / file).read_text())["batches"]:
            work = estimate.decode_work(batch["batch"], batch["context"])
            time = estimate.step_time(config, device, 2, 1, work)
            rows.append(
                {
                    "batch": batch["batch"],
                    "context": batch["context"],
                    "predicted_ms": time.seconds * 1e3,
                    "measured_ms": batch["wall_ms"],
                    "ratio": time.seconds * 1e3 / batch["wall_ms"],
                    "bound": device.bound_name(time.bound),
                }
            )
    return rows


def pool_row() -> dict[str, Any]:
    """The blocks of an engine that sized its pool by memory, with their prediction."""
    config, device = read_model("llama-3-8b"), parse_target("h200").device
    measured = json.loads((RESULTS / POOL).read_text())
    num_seqs, num_tokens = measured["max_num_seqs"], measured["max_num_batched_tokens"]
    left = int(device.memory_bytes * 0.9) - estimate.weight_bytes(config, 2)
    left -= estimate.state_bytes(config, num_seqs)
    left -= estimate.gpu_temp_bytes(config, config.vocab_size, 2, num_tokens, num_seqs)
    blocks = left // estimate.block_bytes(config, 2, 16)
    return {
        "max_num_seqs": num_seqs,
        "max_num_batched_tokens": num_tokens,
        "predicted_blocks": blocks,
        "measured_blocks": measured["num_blocks"],
        "ratio": blocks / measured["num_blocks"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    common.add_output_argument(parser)
    arguments = parser.parse_args()
    steps, pool = step_rows(), pool_row()
    common.print_table(tuple(steps[0]), [tuple(row.values()) for row in steps])
    print()
    common.print_table(tuple(pool), [tuple(pool.values())])
    common.finish({"benchmark": "plan_h200", "steps": steps, "pool": pool}, arguments.json)


if __name__ == "__main__":
    main()
