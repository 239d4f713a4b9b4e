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

from benchmarks.common import environment, print_table
from benchmarks.tpu_compile import (
    BLOCK_SIZES,
    CHIPS,
    CHUNK_TILES,
    DECODE_TILES,
    has_tpu_inference,
    prepare,
)

# Clock in GHz, GB/s of a device's memory. Clocks follow from peak FLOP/s over FLOPs a cycle; those
# of v5p and tpu7x are unsure. v5p: the whole chip's memory, of whose two cores a kernel has one.
RATES = {"v5e": (1.5, 819), "v5p": (1.75, 2765), "v6e": (1.75, 1640), "tpu7x": (1.9, 3690)}
# Bundles that run after a branch is taken.
DELAY_SLOTS = {"v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 6}
KV_TOKEN_BYTES = 2 * 8 * 128 * 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """How a kernel walks a context: `turns` of its longest loop cover `tokens` for all heads.

    Attributes:
        tokens: Tokens of context of a tile.
        turns: Iterations of the loop with the most products that a tile takes.
        queries: Queries of a tile.
        has_outer: Whether the loop around that one is also walked once a tile.
        masked_turns: Iterations of another loop, for a tile that needs a mask; the loop between
            the two masks the logits that the tile before made.
        token_bytes: K and V of a token.
    """

    tokens: int
    turns: int = 1
    queries: int = 1
    has_outer: bool = False
    masked_turns: int | None = None
    token_bytes: int = KV_TOKEN_BYTES


WALKS = {f"attention_decode_{size}": Walk(tokens=1024) for size in BLOCK_SIZES} | {
    "jax_paged_attention_16_by_32": Walk(tokens=512, turns=8),
    "jax_paged_attention_128_by_8": Walk(tokens=1024, turns=8),
    "jax_ragged_paged_attention_16_by_32": Walk(tokens=512),
    "jax_ragged_paged_attention_128_by_8": Walk(tokens=1024),
    "tpu_inference_v3_decode_16": Walk(tokens=4096, has_outer=True),
    "tpu_inference_v3_decode_128": Walk(tokens=4096, has_outer=True),
    # Four of eight KV heads a turn where nothing is masked, else two.
    "attention_chunk": Walk(tokens=512, queries=128, turns=2, has_outer=True, masked_turns=4),
    "tpu_inference_v3_chunk": Walk(tokens=512, queries=128, has_outer=True),
}
WALKS |= {f"attention_decode_32_tile_{n}": Walk(tokens=n) for n in DECODE_TILES}
WALKS |= {
    f"attention_chunk_tile_{rows}x{tokens}": dataclasses.replace(
        WALKS["attention_chunk"], queries=rows // 4, tokens=tokens
    )
    for rows, tokens in CHUNK_TILES
}
WALKS |= {
    f"attention_decode_32_{dtype}": Walk(tokens=2048, token_bytes=KV_TOKEN_BYTES // 2)
    for dtype in ("int8", "fp8")
}
# The rotation: tokens of its inner loop and of the one around it, which is over programs.
ROTATION = "rope_write_kv_16_of_2048_tokens"
ROTATION_TOKENS = (16, 128)
# In and out: 48 heads, and in float32 two angles of a whole head.
ROTATION_TOKEN_BYTES = 2 * 48 * 128 * 2 + 2 * 128 * 4
# Turns of the other loops that an item of `attention_chunk` has: most go over KV heads, the short
# ones over groups of tokens.
ITEM_TURNS = {True: 8, False: 16}
SHORT_LOOP = 100
# Tokens of an iteration of the loop that masks logits made before.
MASK_TOKENS = 64

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


def tile_cycles(loops: list[Loop], walk: Walk) -> dict[str, Any]:
    """Cycles of a tile, all bundles counted; and of the ends of an item, at most."""
    inner, *others = sorted((x for x in loops if x.matmuls), key=lambda x: -x.matmuls)
    found = {"tile_cycles": walk.turns * inner.own_cycles, "slot_use": inner.slot_use}
    if not walk.has_outer:
        return found
    outer = min(
        (x for x in loops if x.first < inner.first and x.last >= inner.last),
        key=lambda x: x.last - x.first,
    )
    found["tile_cycles"] += outer.own_cycles
    if walk.masked_turns is not None:
        masked = others[0]
        within = [x for x in loops if outer.first < x.first < outer.last and not x.matmuls]
        masking = [x for x in within if inner.last < x.first and x.last < masked.first]
        within = [x for x in within if x not in masking]
        found["masked_tile_cycles"] = (
            outer.own_cycles
            + walk.masked_turns * masked.own_cycles
            + walk.tokens // MASK_TOKENS * sum(x.own_cycles for x in masking)
        )
        found["item_cycles"] = sum(
            ITEM_TURNS[x.own_cycles >= SHORT_LOOP] * x.own_cycles for x in within
        )
    return found


def rotation_cycles(loops: list[Loop]) -> dict[str, Any]:
    """Cycles of a token of the rotation, all bundles of both its loops counted."""
    outer, inner = sorted(loops, key=lambda x: x.first)
    per_group, per_program = ROTATION_TOKENS
    cycles = inner.own_cycles / per_group + outer.own_cycles / per_program
    return {"cycles_per_token": round(cycles, 2), "slot_use": inner.slot_use}


def estimate(chip: str, kernel: str) -> dict[str, Any]:
    """Compiles one kernel for one chip and says what its loop over the context or tokens takes."""
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
    clock, gb_per_s = RATES[chip]
    if kernel == ROTATION:
        result |= rotation_cycles(loops)
        ratio = result["cycles_per_token"] / clock / (ROTATION_TOKEN_BYTES / gb_per_s)
        return result | {"compute_over_dma": round(ratio, 2)}
    walk = WALKS[kernel]
    result |= tile_cycles(loops, walk)
    cycles = result["tile_cycles"]
    if walk.queries > 1:
        # Queries of 32 heads times tokens of context times D, in QK and in PV.
        flops = 4 * 32 * walk.queries * walk.tokens * 128
        return result | {"tflops_per_s_estimated": round(flops / cycles * clock / 1e3, 1)}
    cycles /= walk.tokens
    return result | {
        "cycles_per_kv_token": round(cycles, 3),
        "compute_over_dma": round(cycles / clock / (walk.token_bytes / gb_per_s), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--chips", nargs="*", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    kernels = [name for name in WALKS if not name.startswith("tpu_inference")]
    if has_tpu_inference():
        kernels = list(WALKS)
    else:
        print("tpu-inference is not installed: its kernels are left out")
    kernels.append(ROTATION)
    rows = [estimate(chip, kernel) for kernel in kernels for chip in arguments.chips]
    keys = ("kernel", "chip", "cycles_per_kv_token", "cycles_per_token", "compute_over_dma")
    keys += ("tile_cycles", "masked_tile_cycles", "item_cycles", "compile_s")
    print_table(
        (*keys, "spills", "MATPUSH"),
        [
            [row.get(key, row.get("error", "")[:40]) for key in keys]
            + [row.get("slot_use", {}).get(kind, "") for kind in ("VSTORE:SPILL", "MATPUSH")]
            for row in rows
        ],
    )
    if arguments.out is not None:
        prepare(arguments.chips[0])
        results = {"environment": environment(), "rates": RATES, "rows": rows}
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
