"""What long work costs a GPU that reaches its power limit: a product in a burst, and for seconds.

Usage: python benchmarks/power.py [--rows 16384] [--seconds 3] [--json FILE]

One product after another of Llama-3-8B's gate and up projection in bfloat16, first a few on a cool
chip and then for seconds. Clock and power are what `nvidia-smi` says meanwhile, every quarter of a
second, if there is one. Floors of long prefills should be counted with the second figure.
"""

import argparse
import contextlib
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import jax
import jax.numpy as jnp

DEPTH, COLUMNS = 4096, 28672
BURST = 4
_QUERY = ("clocks.sm", "power.draw", "clocks_event_reasons.active")


def product_s(call: Callable[[], jax.Array], seconds: float | None) -> tuple[float, int]:
    """Seconds a product, of a burst or of as many as fill that time; and how many those were."""
    start = time.perf_counter()
    count = BURST
    if seconds is not None:
        jax.block_until_ready([call() for _ in range(BURST)])
        count = max(BURST, int(seconds * BURST / (time.perf_counter() - start)))
        start = time.perf_counter()
    for _ in range(count - 1):
        call()
    jax.block_until_ready(call())
    return (time.perf_counter() - start) / count, count


@contextlib.contextmanager
def watched() -> Iterator[list[list[str]]]:
    """Collects what `nvidia-smi` says of the first GPU until the end: clock, power, reasons."""
    samples: list[list[str]] = []
    program = shutil.which("nvidia-smi")
    if program is None:
        yield samples
        return
    query = f"--query-gpu={','.join(_QUERY)}"
    command = [program, "-i", "0", query, "--format=csv,noheader,nounits", "-lms", "250"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield samples
        finally:
            process.terminate()
            out, _ = process.communicate()
            samples += [line.split(", ") for line in out.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=3.0)
    common.add_output_argument(parser)
    args = parser.parse_args()
    if args.rows < 1 or args.seconds <= 0:
        parser.error("--rows and --seconds must be positive")
    x_key, w_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (args.rows, DEPTH), jnp.bfloat16)
    w = jax.random.normal(w_key, (DEPTH, COLUMNS), jnp.bfloat16) * DEPTH**-0.5
    multiply = jax.jit(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.bfloat16))
    jax.block_until_ready(multiply(x, w))
    time.sleep(1.0)  # the chip cools
    tflop = 2e-12 * args.rows * DEPTH * COLUMNS
    rows: list[list[Any]] = []
    results: dict[str, Any] = {"benchmark": "power", "rows": args.rows}
    for name, seconds in (("burst", None), ("sustained", args.seconds)):
        with watched() as samples:
            each_s, count = product_s(lambda: multiply(x, w), seconds)
        # The first half is spent on getting there.
        half = samples[len(samples) // 2 :]
        clock, power = (
            statistics.median(float(sample[i]) for sample in half) if half else None for i in (0, 1)
        )
        results[name] = {
            "products": count,
            "us": 1e6 * each_s,
            "tflop_s": tflop / each_s,
            "sm_clock_mhz": clock,
            "power_w": power,
            "clock_event_reasons": sorted({sample[2] for sample in half}),
        }
        shown = ["-" if value is None else value for value in (clock, power)]
        rows.append([name, count, 1e6 * each_s, tflop / each_s, *shown])
    common.print_table(["work", "products", "us each", "TFLOP/s", "SM clock, MHz", "W"], rows)
    common.finish(results, args.json)


if __name__ == "__main__":
    main()
