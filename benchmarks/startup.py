"""From process start to the first streamed token of `jpaged generate`: empty and warm cache."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import common

PROMPT = "Explain in three sentences why the sky is blue."
AIMS = {"empty": 25.0, "warm": 8.0}


def time_to_first_token(cache: str) -> float:
    """Seconds until the first byte of text on standard output."""
    # Only what ends in text counts: the command prints nothing else there.
    command = [sys.executable, "-m", "jpaged", "generate", PROMPT, "--max-tokens", "16"]
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, "--temperature", "0", "--quiet"],
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode or not first.strip():
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    common.add_output_argument(parser)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"empty": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            seconds["empty"].append(time_to_first_token(cache))
            seconds["warm"].append(time_to_first_token(cache))
    rows = [
        [f"{name} cache", min(times), statistics.median(times), max(times), AIMS[name]]
        for name, times in seconds.items()
    ]
    common.print_table(["first token, s", "min", "median", "max", "aim"], rows)
    results: dict[str, Any] = {"benchmark": "startup", "prompt": PROMPT, "seconds": seconds}
    common.finish(results, args.json)


if __name__ == "__main__":
    main()
