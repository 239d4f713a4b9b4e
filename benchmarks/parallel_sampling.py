"""n samples of one long prompt: as one request, and as n requests that share nothing.

Usage: python benchmarks/parallel_sampling.py [--n 8] [--prompt-tokens 1000] [--json FILE]

The same engine, random token ids as the prompt, prefix cache off on both sides, so that whatever
is shared is shared by forking. The two sides run in turn; the fastest of the repeats counts. Where
other work disturbs the machine, the processor time of the two sides says more than wall time.

  prefill      prompt tokens that were computed
  prompt KV    bytes of the blocks in use when the last prompt token is computed: for n requests the
               first of them have begun to write output by then
  peak KV      bytes of the blocks in use at most
  tokens/s     generated tokens over the time from the first request to the last token
  cpu s        the process's own processor time meanwhile
  ratio        of tokens/s, to that of n requests
"""

import argparse
import dataclasses
import time
from typing import Any

import common
import numpy as np

from jpaged import LLM, SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One side of one round."""

    seconds: float
    cpu_seconds: float
    prefill_tokens: int
    prompt_blocks: int
    peak_blocks: int
    copies: int


def run(llm: LLM, prompt: list[int], params: list[SamplingParams]) -> Measured:
    """Runs requests of one prompt to their end."""
    engine = llm.engine
    requests = [
        engine.make_request(f"r{i}", {"prompt_token_ids": prompt}, p) for i, p in enumerate(params)
    ]
    before = engine.stats().scheduler
    prefill_tokens, prompt_blocks, peak_blocks, num_tokens = 0, 0, 0, 0
    start, cpu_start = time.perf_counter(), time.process_time()
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished:
        for output in engine.step():
            if output.finished:
                num_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        stats = engine.stats().scheduler
        peak_blocks = max(peak_blocks, stats.blocks.used)
        if stats.num_prefill_tokens - before.num_prefill_tokens > prefill_tokens:
            prefill_tokens = stats.num_prefill_tokens - before.num_prefill_tokens
            prompt_blocks = stats.blocks.used
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    expected = sum(p.n * (p.max_tokens or 0) for p in params)
    assert num_tokens == expected, f"{num_tokens} tokens instead of {expected}"
    copies = engine.stats().scheduler.blocks.copies - before.blocks.copies
    return Measured(seconds, cpu_seconds, prefill_tokens, prompt_blocks, peak_blocks, copies)


def compare(llm: LLM, prompt: list[int], n: int, max_tokens: int, repeats: int) -> dict[str, Any]:
    """Both sides in turn, and what one saves over the other."""
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
    sides = {
        "one_request": [dataclasses.replace(params, n=n)],
        "n_requests": [dataclasses.replace(params, seed=seed) for seed in range(n)],
    }
    runs: dict[str, list[Measured]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            runs[name].append(run(llm, prompt, side))
    spec, num_layers = llm.engine.runner.worker.kv_spec, llm.engine.model_config.num_layers
    block_bytes = spec.block_bytes * num_layers
    result: dict[str, Any] = {"max_tokens": max_tokens}
    for name, found in runs.items():
        last = found[-1]
        seconds = [one.seconds for one in found]
        result[name] = {
            "prefill_tokens": last.prefill_tokens,
            "prompt_kv_bytes": last.prompt_blocks * block_bytes,
            "peak_kv_bytes": last.peak_blocks * block_bytes,
            "block_copies": last.copies,
            "seconds": seconds,
            "cpu_seconds": [one.cpu_seconds for one in found],
            "tokens_per_s": n * max_tokens / min(seconds),
        }
    ours, theirs = result["one_request"], result["n_requests"]
    result["throughput_ratio"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
    result["cpu_time_ratio"] = min(theirs["cpu_seconds"]) / min(ours["cpu_seconds"])
    result["one_prompt_kv_bytes"] = -(-len(prompt) // spec.block_size) * block_bytes
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="the default model if not given")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--repeats", type=int, default=3)
    common.add_output_argument(parser)
    args = parser.parse_args()
    if min(args.n, args.prompt_tokens, args.repeats, *args.max_tokens) < 1:
        parser.error("--n, --prompt-tokens, --max-tokens and --repeats must be at least 1")

    prompt = np.random.default_rng(0).integers(256, 40_000, args.prompt_tokens).tolist()
    options: dict[str, Any] = {"model": args.model} if args.model else {}
    with LLM(
        **options,
        max_num_seqs=args.n,
        max_model_len=args.prompt_tokens + max(args.max_tokens),
        enable_prefix_caching=False,
        compilation="eager",
    ) as llm:
        config = llm.engine.scheduler.config
        compare(llm, prompt, args.n, max_tokens=2, repeats=1)  # programs touch their pages
        cases = [compare(llm, prompt, args.n, length, args.repeats) for length in args.max_tokens]

    print(
        f"{args.n} samples of a prompt of {args.prompt_tokens} tokens, one of which takes "
        f"{cases[0]['one_prompt_kv_bytes'] / 1e6:.1f} MB"
    )
    rows = [
        [
            case["max_tokens"],
            name,
            case[name]["prefill_tokens"],
            case[name]["prompt_kv_bytes"] / 1e6,
            case[name]["peak_kv_bytes"] / 1e6,
            case[name]["block_copies"],
            min(case[name]["seconds"]),
            min(case[name]["cpu_seconds"]),
            case[name]["tokens_per_s"],
            case["throughput_ratio"] if name == "one_request" else 1.0,
        ]
        for case in cases
        for name in ("one_request", "n_requests")
    ]
    header = ["output", "side", "prefill", "prompt KV MB", "peak KV MB", "copies", "s", "cpu s"]
    common.print_table([*header, "tokens/s", "ratio"], rows)
    result = {
        "benchmark": "parallel_sampling",
        "n": args.n,
        "prompt_tokens": args.prompt_tokens,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "repeats": args.repeats,
        "cases": cases,
    }
    common.finish(result, args.json)


if __name__ == "__main__":
    main()
