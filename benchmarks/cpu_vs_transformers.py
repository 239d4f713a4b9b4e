"""Side by side with `transformers` on a CPU: one request, and 32 of mixed lengths.

Same machine, same run, same dequantised float32 weights of the default model. `transformers` runs
static padded batches: prompts padded on the left, every batch until its longest output is done,
in order of arrival; the best of several batch sizes counts. Tokens count when somebody asked for
them. Needs torch and the folder of request lengths.
"""

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

from jpaged import LLM, SamplingParams

VOCAB = 49152


def run_ours(prompts: list[list[int]], lengths: list[int], max_num_seqs: int) -> dict[str, Any]:
    """Seconds, time of each token of a lone request, and waste of slots, after a warm-up."""
    options: dict[str, Any] = {"max_num_seqs": max_num_seqs, "compilation": "eager"}
    with LLM(dtype="float32", **options) as llm:
        engine = llm.engine
        for seed in range(2):  # programs are compiled; this touches their pages
            warm = np.random.default_rng(seed).integers(256, VOCAB, (4, 40)).tolist()
            llm.generate(warm, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        requests = [
            engine.make_request(
                f"r{i}",
                prompt,
                SamplingParams(temperature=0, max_tokens=length, ignore_eos=True),
            )
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        start = time.perf_counter()
        for request in requests:
            engine.add_request(request)
        token_times, batch = [], []
        wasted = allocated = 0
        host_before = engine.stats().host_time_s
        outputs = {}
        while engine.has_unfinished:
            for output in engine.step():
                outputs[output.request_id] = output
            token_times.append(time.perf_counter() - start)
            stats = engine.stats().scheduler
            batch.append(stats.num_running_seqs)
            wasted += stats.blocks.wasted_slots
            allocated += stats.blocks.allocated_slots
        seconds = time.perf_counter() - start
        host = engine.stats().host_time_s - host_before
        for request, length in zip(requests, lengths, strict=True):
            assert len(outputs[request.request_id].outputs[0].token_ids) == length
        return {
            "seconds": seconds,
            "first_token_s": token_times[0],
            "token_times": token_times,
            # Of the slots held, summed over all steps: ramp-up and tail included.
            "waste": wasted / allocated,
            "mean_batch": statistics.mean(batch),
            "steps": len(batch),
            "host_ms_a_step": 1e3 * host / len(batch),
        }


def load_transformers() -> Any:
    """transformers' model with the same weights, float32."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers_oracle import load_default_model

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return load_default_model()


def run_transformers(
    model: Any, prompts: list[list[int]], lengths: list[int], batch_size: int
) -> float:
    """Seconds for all requests in static padded batches."""
    import torch  # pyright: ignore[reportMissingImports]

    start = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        longest = max(map(len, batch))
        num_new = max(lengths[first : first + batch_size])
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
                pad_token_id=0,
            )
    return time.perf_counter() - start


def one_request(model: Any, prompt_len: int, num_new: int, rounds: int) -> dict[str, Any]:
    """Decode tokens a second of a lone request, the two sides in turn."""
    prompt = np.random.default_rng(0).integers(256, VOCAB, prompt_len).tolist()
    ours, theirs = [], []
    for _ in range(rounds):
        times = run_ours([prompt], [num_new], 1)["token_times"]
        ours.append((num_new - 1) / (times[-1] - times[-num_new]))
        if model is not None:
            whole = run_transformers(model, [prompt], [num_new], 1)
            first = run_transformers(model, [prompt], [1], 1)
            theirs.append((num_new - 1) / (whole - first))
    result = {"prompt_tokens": prompt_len, "new_tokens": num_new, "ours_tok_s": max(ours)}
    if theirs:
        result |= {"transformers_tok_s": max(theirs), "ratio": max(ours) / max(theirs)}
    return result


def many_requests(model: Any, workloads: Path, batch_sizes: list[int]) -> dict[str, Any]:
    """Throughput over 32 requests with real lengths."""
    loader = common.load_workloads(workloads)
    # Half of the model's context is enough for a machine of 2 cores.
    sample = random.Random(0).sample(loader.load("sharegpt_single"), 32)
    prompts = [loader.prompt_token_ids(r, vocab=VOCAB) for r in sample]
    lengths = [r.output_tokens for r in sample]
    ours = run_ours(prompts, lengths, 32)
    tokens = sum(lengths)
    result: dict[str, Any] = {
        "requests": len(sample),
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": tokens,
        "ours_s": ours["seconds"],
        "ours_tok_s": tokens / ours["seconds"],
        "ours_mean_batch": ours["mean_batch"],
        "ours_steps": ours["steps"],
        "host_ms_a_step": ours["host_ms_a_step"],
        "wasted_slots": ours["waste"],
    }
    if model is not None:
        by_size = {size: run_transformers(model, prompts, lengths, size) for size in batch_sizes}
        best = min(by_size.values())
        result |= {
            "transformers_s": by_size,
            "transformers_tok_s": tokens / best,
            "ratio": best / ours["seconds"],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", type=Path, required=True, help="folder of request lengths")
    parser.add_argument("--rounds", type=int, default=3, help="of the lone request")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--only", choices=("one", "many"))
    parser.add_argument("--without-transformers", action="store_true")
    common.add_output_argument(parser)
    args = parser.parse_args()
    model = None if args.without_transformers else load_transformers()
    results: dict[str, Any] = {"benchmark": "cpu_vs_transformers", "dtype": "float32"}
    rows = []
    if args.only != "many":
        one = results["one_request"] = one_request(model, 64, 128, args.rounds)
        rows.append(
            [
                "1 request, decode",
                one["ours_tok_s"],
                one.get("transformers_tok_s", "-"),
                one.get("ratio", "-"),
                "1.0",
            ]
        )
    if args.only != "one":
        many = results["many_requests"] = many_requests(model, args.workloads, args.batch_sizes)
        rows.append(
            [
                "32 requests",
                many["ours_tok_s"],
                many.get("transformers_tok_s", "-"),
                many.get("ratio", "-"),
                "2.0",
            ]
        )
        waste = 100 * many["wasted_slots"]
        print(f"slots wasted, of those allocated over all steps: {waste:.2f} % (aim: under 4 %)")
    common.print_table(["work", "jpaged tok/s", "transformers tok/s", "ratio", "aim"], rows)
    common.finish(results, args.json)


if __name__ == "__main__":
    main()
