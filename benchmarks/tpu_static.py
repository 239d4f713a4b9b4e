"""Estimates of the TPU attention kernels from the compiler's static schedule, without a TPU.

    python -m benchmarks.tpu_static [--chips v6e ...] [--out FILE]

Each kernel is compiled for each generation and its schedule read as it stands before the compiler
takes the empty bundles out: there a bundle is a cycle, and the waits for results are in it. What
counts is the loop over the context with all its conditional parts, over the tokens an iteration
covers, beside the time that the DMA of those tokens takes at the memory's full rate. Waits for DMAs
cannot be seen in it. Nothing here was measured.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import print_table
from benchmarks.tpu_compile import BLOCK_SIZES, CHIPS

# Clock in GHz, GB/s of a device's memory. Clocks follow from peak FLOP/s over FLOPs a cycle; those
# of v5p and tpu7x are unsure. v5p: the whole chip's memory, of whose two cores a kernel has one.
RATES = {"v5e": (1.5, 819), "v5p": (1.75, 2765), "v6e": (1.75, 1640), "tpu7x": (1.9, 3690)}
# Bundles that run after a branch is taken.
DELAY_SLOTS = {"v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 6}
KV_TOKEN_BYTES = 2 * 8 * 128 * 2
# Tokens of context an iteration covers, and how many iterations all KV heads take.
DECODES = {f"attention_decode_{size}": (1024, 1) for size in BLOCK_SIZES} | {
    "jax_paged_attention_16_by_32": (512, 8),
    "jax_paged_attention_128_by_8": (1024, 8),
    "jax_ragged_paged_attention_16_by_32": (512, 1),
    "jax_ragged_paged_attention_128_by_8": (1024, 1),
}
# Queries and tokens of context of an iteration.
CHUNK = ("attention_chunk", 128, 512)
# Turns of its loop over KV heads, four in each.
PACK_TURNS = 2

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:[\s>]*\{", re.MULTILINE)
_BRANCH = re.compile(r"sbr\.rel\s*(?:\([^)]*\))?\s*target bundleno = (\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """One loop of a schedule: bundles from `first` to `last`, of which inner loops have a part."""

    first: int
    last: int
    own_cycles: int
    empty: int
    matmuls: int
    slot_use: dict[str, float]


def read_loops(schedule: str, utilization: str, delay_slots: int) -> list[Loop]:
    """The loops of a schedule, in order.

    Args:
        schedule: Text of `*-packed-bundles-post-ra.txt`.
        utilization: Text of `*-pre-delay_hlo-static-per-bundle-utilization.txt`: the slots each
            bundle takes, after a line with the kinds and one with how many of each there are.
        delay_slots: Bundles that run after a branch is taken.

    Raises:
        ValueError: The two do not have the same bundles.
    """
    starts = [match.end() for match in _BUNDLE.finditer(schedule)]
    bundles = [
        re.sub(r"/\*.*?\*/", "", schedule[a:b], flags=re.DOTALL).rsplit("}", 1)[0].strip()
        for a, b in zip(starts, [*starts[1:], len(schedule)], strict=True)
    ]
    lines = utilization.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("MATMUL"))
    kinds = [kind.strip() for kind in lines[head].split(",")]
    slots = [int(n) for n in lines[head + 1].split()]
    used = [[int(n) for n in line.split()] for line in lines[head + 2 :] if line[:1].isdigit()]
    if len(used) != len(bundles):
        raise ValueError(f"{len(bundles)} bundles in the schedule, {len(used)} in the utilization")
    ends: dict[int, int] = {}
    for i, bundle in enumerate(bundles):
        for target in map(int, _BRANCH.findall(bundle)):
            if target <= i:
                end = min(i + delay_slots, len(bundles) - 1)
                ends[target] = max(ends.get(target, 0), end)
    loops = []
    for first, last in sorted(ends.items()):
        inner = {i for a, b in ends.items() if first < a and b <= last for i in range(a, b + 1)}
        own = [i for i in range(first, last + 1) if i not in inner]
        totals = [sum(used[i][k] for i in own) for k in range(len(kinds))]
        loops.append(
            Loop(
                first=first,
                last=last,
                own_cycles=len(own),
                empty=sum(not bundles[i] for i in own),
                matmuls=sum(bundles[i].count("vmatmul") for i in own),
                slot_use={
                    kind: round(total / (count * len(own)), 3)
                    for kind, total, count in zip(kinds, totals, slots, strict=True)
                },
            )
        )
    return loops


def _chunk_cycles(loops: list[Loop], packs_loop: Loop, clock: float) -> dict[str, Any]:
    """Cycles of a tile, whose loop over heads is `packs_loop`; and of an item's ends at most."""
    tile_loop = min(
        (x for x in loops if x.first < packs_loop.first and x.last > packs_loop.last),
        key=lambda x: x.last - x.first,
    )
    cycles = tile_loop.own_cycles + PACK_TURNS * packs_loop.own_cycles
    # Loops that clear an item's state and write its output, a turn a head; waits are among them.
    others = [x for x in loops if x.first > tile_loop.first and x.last < tile_loop.last]
    ends = sum(x.own_cycles for x in others if x is not packs_loop)
    # Queries of 32 heads times tokens of context times D, in QK and in PV.
    flops = 4 * 32 * CHUNK[1] * CHUNK[2] * 128
    return {
        "loop_cycles": cycles,
        "item_cycles": 8 * ends,
        "tflops_per_s_estimated": round(flops / cycles * clock / 1e3, 1),
    }


def estimate(chip: str, kernel: str) -> dict[str, Any]:
    """Compiles one kernel for one chip and says what its loop over the context takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.tpu_compile", "--chip", chip]
        command += ["--only", kernel, "--dump", folder]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
        )
        if done.returncode:
            error = done.stderr.strip().splitlines()[-1:] or ["no output"]
            return {"chip": chip, "kernel": kernel, "error": error[0][:300]}
        result = json.loads(done.stdout)
        (schedule,) = (
            file
            for file in Path(folder).glob("*-packed-bundles-post-ra.txt")
            if "schedule-analysis" not in file.name
        )
        (utilization,) = Path(folder).glob("*pre-delay_hlo-static-per-bundle-utilization.txt")
        loops = read_loops(schedule.read_text(), utilization.read_text(), DELAY_SLOTS[chip])
    loop = max(loops, key=lambda loop: loop.matmuls)
    clock, gb_per_s = RATES[chip]
    result |= {"loop_cycles": loop.own_cycles, "empty": loop.empty, "slot_use": loop.slot_use}
    if kernel == CHUNK[0]:
        return result | _chunk_cycles(loops, loop, clock)
    tokens, iterations = DECODES[kernel]
    cycles = loop.own_cycles * iterations / tokens
    result |= {
        "cycles_per_kv_token": round(cycles, 3),
        "compute_over_dma": round(cycles / clock / (KV_TOKEN_BYTES / gb_per_s), 2),
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--chips", nargs="*", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    rows = [estimate(chip, kernel) for kernel in (*DECODES, CHUNK[0]) for chip in arguments.chips]
    keys = ("kernel", "chip", "cycles_per_kv_token", "compute_over_dma", "loop_cycles", "compile_s")
    print_table(
        (*keys, "spills", "MATPUSH"),
        [
            [row.get(key, row.get("error", "")[:40]) for key in keys]
            + [row.get("slot_use", {}).get(kind, "") for kind in ("VSTORE:SPILL", "MATPUSH")]
            for row in rows
        ],
    )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"rates": RATES, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
