"""From process start to the first token: empty and warm compilation cache.

`jpaged generate` with the default model and its first streamed token; with `--config NAME` a
Python program with `LLM`, random weights of that model's shapes and the engine's own settings.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import common
import dummy_model

from jpaged.plan.shapes import SHAPES

PROMPT = "Explain in three sentences why the sky is blue."
# On two cores of a CPU, and on one H200 with the shapes of an 8B model.
AIMS = {"empty": 25.0, "warm": 8.0}
DUMMY_AIMS = {"empty": 45.0, "warm": 20.0}


def generate_first_token(config: str) -> None:
    """Prints one token id: what the timed program does."""
    from jpaged import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as directory:
        model = dummy_model.write_config(config, directory)
        llm = LLM(model, load_format="dummy", skip_tokenizer_init=True)
    with llm:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1)
        (output,) = llm.generate([list(range(64))], params, use_tqdm=False)
        print(output.outputs[0].token_ids[0], flush=True)


def time_to_first_token(cache: str, config: str | None) -> float:
    """Seconds until the first byte of text on standard output."""
    # Only what ends in text counts: the command prints nothing else there.
    if config is None:
        command = [sys.executable, "-m", "jpaged", "generate", PROMPT, "--max-tokens", "16"]
        command += ["--temperature", "0", "--quiet"]
    else:
        command = [sys.executable, __file__, "--config", config, "--once"]
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    start = time.perf_counter()
    with subprocess.Popen(
        command,
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
    parser.add_argument("--config", choices=tuple(SHAPES), help="random weights")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    common.add_output_argument(parser)
    args = parser.parse_args()
    if args.once:
        generate_first_token(args.config)
        return
    seconds: dict[str, list[float]] = {"empty": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            seconds["empty"].append(time_to_first_token(cache, args.config))
            seconds["warm"].append(time_to_first_token(cache, args.config))
    aims = AIMS if args.config is None else DUMMY_AIMS
    rows = [
        [f"{name} cache", min(times), statistics.median(times), max(times), aims[name]]
        for name, times in seconds.items()
    ]
    common.print_table(["first token, s", "min", "median", "max", "aim"], rows)
    what = {"prompt": PROMPT} if args.config is None else {"model": args.config}
    results: dict[str, Any] = {"benchmark": "startup", **what, "seconds": seconds}
    common.finish(results, args.json)


if __name__ == "__main__":
    main()
