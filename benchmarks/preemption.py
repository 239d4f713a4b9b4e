"""What preemption costs under each policy: the same requests, a pool of a tenth of their need.

Distinct random prompts of one length, greedy, a fixed number of tokens each. The pool holds a tenth
of the blocks that all of them have at their ends, so sequences that run side by side outgrow it and
the newest gives way, again and again. The rows:

  roomy      a pool for all of them: no preemption
  alone      the small pool, one sequence at a time: no preemption either
  recompute  blocks are forgotten; what is still in the prefix cache need not be computed again
  uncached   the same without prefix cache
  swap       blocks go to the host and come back
  auto       whatever was measured to be quicker

Each policy's tokens are checked to be those of the roomy run. "again" is tokens computed more than
once, "moved" is bytes copied between pool and host, both ways. "cost" is seconds more than the same
small pool took under the cheapest policy, a preempted sequence. Medians over the repeats.
"""

import argparse
import statistics
import time
from typing import Any

import common
import numpy as np

from jpaged import LLM, SamplingParams

POLICIES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "alone": {"max_num_seqs": 1},
    "recompute": {},
    "uncached": {"enable_prefix_caching": False},
    "swap": {"preemption_mode": "swap"},
    "auto": {"preemption_mode": "auto"},
}


def make_prompts(args: argparse.Namespace, repeat: int, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng((repeat, args.prompt_length))
    shape = (args.num_requests, args.prompt_length)
    return rng.integers(10, vocab_size, shape).tolist()


def num_blocks_needed(args: argparse.Namespace) -> tuple[int, int]:
    """Blocks of one request at its end, and of all."""
    one = -(-(args.prompt_length + args.output_length) // args.block_size)
    return one, one * args.num_requests


def options_of(policy: str, args: argparse.Namespace) -> dict[str, Any]:
    one, all_of_them = num_blocks_needed(args)
    small = max(one, all_of_them // 10)
    return {
        "model": args.model,
        "max_model_len": args.prompt_length + args.output_length,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": max(args.prompt_length, args.max_num_seqs),
        "block_size": args.block_size,
        "num_blocks": 1 + (all_of_them if policy == "roomy" else small),
        "max_logprobs": 0,
        "skip_tokenizer_init": True,
        "compilation": "lazy",  # the warm-up compiles what the runs need
        **POLICIES[policy],
    }


def run_policy(policy: str, args: argparse.Namespace) -> tuple[dict[str, Any], list[list[int]]]:
    """One policy's figures, and the tokens of every request of every repeat."""
    params = SamplingParams(temperature=0, max_tokens=args.output_length, ignore_eos=True)
    tokens: list[list[int]] = []
    runs: list[dict[str, float]] = []
    with LLM(**options_of(policy, args)) as llm:
        vocab_size = llm.engine.model_config.vocab_size
        runner = llm.engine.runner
        block_bytes = runner.worker.kv_spec.block_bytes * llm.engine.model_config.num_layers
        for repeat in range(args.repeats + 1):
            prompts = [{"prompt_token_ids": p} for p in make_prompts(args, repeat, vocab_size)]
            before = llm.stats().scheduler
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            after = llm.stats().scheduler
            if repeat == 0:
                continue  # warm-up
            tokens += [output.outputs[0].token_ids for output in outputs]
            prefill = after.num_prefill_tokens - before.num_prefill_tokens
            moved = after.blocks.swapped_out + after.blocks.swapped_in
            moved -= before.blocks.swapped_out + before.blocks.swapped_in
            runs.append(
                {
                    "seconds": seconds,
                    "num_preemptions": after.num_preemptions - before.num_preemptions,
                    "num_swaps": after.num_swaps - before.num_swaps,
                    "num_tokens_again": prefill - args.num_requests * args.prompt_length,
                    "num_steps": after.num_steps - before.num_steps,
                    "moved_bytes": moved * block_bytes,
                }
            )
        stats = llm.stats()
    found: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    found["spread"] = (max(r["seconds"] for r in runs) - min(r["seconds"] for r in runs)) / found[
        "seconds"
    ]
    found["tokens_per_s"] = args.num_requests * args.output_length / found["seconds"]
    if stats.block_copy_s is not None:
        found["measured_copy_bytes_per_s"] = block_bytes / stats.block_copy_s
    if stats.prefill_token_s is not None:
        found["measured_prefill_tokens_per_s"] = 1 / stats.prefill_token_s
    return found, tokens


def add_costs(results: dict[str, dict[str, Any]]) -> None:
    """Adds what a preempted sequence costs more than under the cheapest policy."""
    preempting = [found for found in results.values() if found["num_preemptions"]]
    for found in preempting:
        least = min(other["seconds"] for other in preempting)
        found["cost_s"] = (found["seconds"] - least) / found["num_preemptions"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--num-requests", type=int, default=20)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--output-length", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    common.add_output_argument(parser)
    args = parser.parse_args()
    if args.num_requests < 10 or min(args.prompt_length, args.output_length, args.repeats) < 1:
        parser.error("--num-requests must be at least 10, lengths and --repeats at least 1")

    results: dict[str, dict[str, Any]] = {}
    expected: list[list[int]] | None = None
    for policy in args.policies:
        results[policy], tokens = run_policy(policy, args)
        expected = expected or tokens
        results[policy]["same_tokens"] = tokens == expected
        print(f"{policy}: {results[policy]['seconds']:.2f} s", flush=True)
    add_costs(results)
    one, all_of_them = num_blocks_needed(args)
    print(
        f"{args.num_requests} requests of {args.prompt_length} + {args.output_length} tokens: "
        f"{all_of_them} blocks of {args.block_size} at their ends, "
        f"{options_of('swap', args)['num_blocks'] - 1} in the small pool"
    )
    rows = [
        [
            policy,
            found["seconds"],
            found["tokens_per_s"],
            found["num_preemptions"],
            found["num_swaps"],
            found["num_tokens_again"],
            found["moved_bytes"] / 1e6,
            1e3 * found.get("cost_s", 0.0),
            found["same_tokens"],
        ]
        for policy, found in results.items()
    ]
    header = (
        "policy",
        "s",
        "tok/s",
        "preempted",
        "swapped",
        "again",
        "moved MB",
        "cost ms",
        "same",
    )
    common.print_table(header, rows)
    result = {
        "benchmark": "preemption",
        "num_requests": args.num_requests,
        "prompt_length": args.prompt_length,
        "output_length": args.output_length,
        "max_num_seqs": args.max_num_seqs,
        "block_size": args.block_size,
        "blocks_of_one": one,
        "blocks_needed": all_of_them,
        "repeats": args.repeats,
        "policies": results,
    }
    common.finish(result, args.json)
    if not all(found["same_tokens"] for found in results.values()):
        raise SystemExit("a policy changed the tokens")


if __name__ == "__main__":
    main()
