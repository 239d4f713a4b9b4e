"""Offline throughput of a real trace's lengths, against the floor of exactly that work.

Usage: python benchmarks/throughput.py --workloads DIR [--trace azure_conv] [--json FILE]
       python benchmarks/throughput.py --steady 64 [--json FILE]

Llama-3-8B's shapes with random weights by default, greedy, prefix caching off, random prompts of
the trace's lengths, all requests at once, the engine stepped as by `LLM.generate`; every output
must have exactly the length asked for. Everything that will be needed is compiled before the clock
starts.

`--steady S` runs S requests of 64 + 512 tokens instead and reports the milliseconds an output token
of steady decode: from when all decode to when the first ends, a few steps at either end left out.

The floor (roofline.py) is that of continuous batching with the same limits and unlimited memory.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import dummy_model
import numpy as np
from roofline import Ceilings, ModelShape, offline_floor, step_floor_s, visible_pairs

from jpaged import LLM, SamplingParams
from jpaged.block_manager import BlockManager
from jpaged.request import Request
from jpaged.sampling_params import RequestOutputKind
from jpaged.scheduler import Scheduler
from jpaged.scheduler_output import SchedulerOutput

MAX_MODEL_LEN = 8192
STEADY_PROMPT, STEADY_OUTPUT = 64, 512
# Steps at either end of the steady decode that do not count.
STEADY_MARGIN = 4


def make_llm(args: argparse.Namespace, directory: str) -> LLM:
    """The engine; what it needs is compiled by `compile_for`."""
    return LLM(
        dummy_model.write_config(args.config, directory),
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        compilation="lazy",
        max_model_len=args.max_total,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_logprobs=args.max_logprobs,
        memory_utilization=args.memory_utilization,
    )


def draw_prompts(lengths: list[int], vocab_size: int) -> list[list[int]]:
    """Random token ids, the same every time."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def greedy(max_tokens: int) -> SamplingParams:
    """Exactly so many tokens."""
    return SamplingParams(
        temperature=0.0,
        ignore_eos=True,
        max_tokens=max_tokens,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class StepWork:
    """What one step has to do."""

    num_tokens: int
    num_sampled: int
    num_seqs: int
    decode_only: bool
    decode_context: int
    prefill_pairs: int

    @property
    def kind(self) -> str:
        """Steps of one kind are reported together."""
        return f"decode, up to {_kind_limit(self.num_seqs)}" if self.decode_only else "mixed"


def _kind_limit(num_seqs: int) -> int:
    return next(limit for limit in (64, 256, 512, 1 << 20) if num_seqs <= limit)


def simulate(llm: LLM, lengths: list[tuple[int, int]]) -> list[StepWork]:
    """The steps of the whole work, by the engine's scheduler and block manager without a device."""
    engine = llm.engine
    manager = BlockManager(engine.runner.num_blocks, engine.config.block_size, False)
    scheduler = Scheduler(engine.scheduler.config, manager)
    for i, (prompt_len, output_len) in enumerate(lengths):
        scheduler.add_request(Request(f"lengths-{i}", [0] * prompt_len, greedy(output_len)))
    works = []
    in_flight = None
    while scheduler.has_unfinished():
        step = scheduler.schedule()
        if step.seqs:
            works.append(_work_of(step))
        if in_flight is not None:
            for seq, samples in zip(in_flight.seqs, in_flight.samples, strict=True):
                if not samples or not scheduler.append_token(seq, 0):
                    continue
                if len(seq.token_ids) == seq.max_length:
                    scheduler.finish_sequence(seq, "length")
        in_flight = step if step.seqs else None
    return works


def _work_of(step: SchedulerOutput) -> StepWork:
    chunks = range(step.num_decodes, len(step.seqs))
    ends = [step.starts[i] + step.num_scheduled_tokens[i] for i in range(len(step.seqs))]
    return StepWork(
        num_tokens=step.num_batched_tokens,
        num_sampled=sum(step.samples),
        num_seqs=len(step.seqs),
        decode_only=not chunks,
        decode_context=sum(ends[: step.num_decodes]),
        prefill_pairs=sum(visible_pairs(step.num_scheduled_tokens[i], ends[i]) for i in chunks),
    )


def compile_for(llm: LLM, works: list[StepWork]) -> int:
    """Compiles the programs that these steps need; how many those are."""
    plan = llm.engine.runner.plan
    sizes = {(work.num_tokens, work.num_seqs, work.decode_only) for work in works}
    programs = {program.name: program for size in sizes for program in [plan.best(*size, True)]}
    plan.compile(programs.values())
    return len(programs)


def run_steps(llm: LLM, prompts: list[list[int]], output_lens: list[int]) -> list[float]:
    """Seconds between the results of each step and of the one before it, of the whole trace.

    Raises:
        RuntimeError: An output has not the length that was asked for.
    """
    engine = llm.engine
    lengths: dict[str, int] = {}
    times = []
    last = time.perf_counter()
    for i, (prompt, length) in enumerate(zip(prompts, output_lens, strict=True)):
        engine.add_request(engine.make_request(f"trace-{i}", prompt, greedy(length)))
    while engine.has_unfinished:
        for output in engine.step():
            lengths[output.request_id] = len(output.outputs[0].token_ids)
        now = time.perf_counter()
        times.append(now - last)
        last = now
    wrong = sum(lengths[f"trace-{i}"] != length for i, length in enumerate(output_lens))
    if wrong:
        raise RuntimeError(f"{wrong} of {len(lengths)} outputs have the wrong length")
    return times


def by_kind(
    works: list[StepWork], times: list[float], model: ModelShape, ceilings: Ceilings
) -> dict[str, dict[str, float]]:
    """Steps, seconds and floor of each kind of step.

    Results come one step late, so the first call returns before the first step has run.
    """
    kinds: dict[str, dict[str, float]] = {}
    for work, seconds in zip(works, times[1:], strict=False):
        kind = kinds.setdefault(work.kind, {"steps": 0, "seconds": 0.0, "floor_s": 0.0})
        parts = step_floor_s(
            model,
            ceilings,
            num_tokens=work.num_tokens,
            num_sampled=work.num_sampled,
            decode_context=work.decode_context,
            prefill_pairs=work.prefill_pairs,
        )
        kind["steps"] += 1
        kind["seconds"] += seconds
        kind["floor_s"] += sum(parts.values())
    return kinds


def run_trace(
    llm: LLM,
    lengths: list[tuple[int, int]],
    works: list[StepWork],
    args: argparse.Namespace,
) -> tuple[dict[str, Any], list[Any]]:
    """Result of the whole trace, and its row of the table."""
    model = dummy_model.model_shape(args.config)
    prompts = draw_prompts([prompt_len for prompt_len, _ in lengths], model.vocab_size)
    output_lens = [output_len for _, output_len in lengths]
    # The programs are there; this makes the device load some of them.
    run_steps(llm, prompts[:8], [min(length, 16) for length in output_lens[:8]])
    before = llm.stats()
    times = run_steps(llm, prompts, output_lens)
    seconds = sum(times)
    stats = llm.stats()
    floor_s, floor_steps = offline_floor(
        lengths,
        model,
        _ceilings(args),
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    num_prompt, num_output = sum(map(len, prompts)), sum(output_lens)
    num_steps = stats.scheduler.num_steps - before.scheduler.num_steps
    compiled_late = stats.num_compilations_after_warmup - before.num_compilations_after_warmup
    result = {
        "trace": args.trace,
        "requests": len(lengths),
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
        "seconds": seconds,
        "tok_s": (num_prompt + num_output) / seconds,
        "output_tok_s": num_output / seconds,
        "steps": num_steps,
        "preemptions": stats.scheduler.num_preemptions - before.scheduler.num_preemptions,
        "host_ms_a_step": 1e3 * (stats.host_time_s - before.host_time_s) / num_steps,
        "compilations_while_timed": compiled_late,
        "floor_s": floor_s,
        "floor_steps": floor_steps,
        "fraction": floor_s / seconds,
        "by_kind": by_kind(works, times, model, _ceilings(args)),
    }
    keys = ("seconds", "tok_s", "output_tok_s", "steps", "floor_s", "fraction")
    return result, [f"{args.trace} x {len(lengths)}", *(result[key] for key in keys)]


def run_steady(llm: LLM, args: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """Result of equal requests that all decode at once, and its row of the table."""
    engine, num_seqs = llm.engine, args.steady
    model = dummy_model.model_shape(args.config)
    output_len = args.steady_output
    prompts = draw_prompts([STEADY_PROMPT] * num_seqs, model.vocab_size)
    # As many sequences as in the timed run, so that the same programs run.
    run_steps(llm, prompts, [16] * num_seqs)
    requests = [
        engine.make_request(f"steady-{i}", prompt, greedy(output_len))
        for i, prompt in enumerate(prompts)
    ]
    before = llm.stats()
    # Tokens of the one that started last, and of the one that ends first, after each step.
    last_started, first_ended = (
        requests[-1].sequences[0].token_ids,
        requests[0].sequences[0].token_ids,
    )
    counts, times, lengths = [], [], []
    start = time.perf_counter()
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished:
        for output in engine.step():
            lengths.append(len(output.outputs[0].token_ids))
        times.append(time.perf_counter() - start)
        counts.append((len(last_started), len(first_ended)))
    stats = llm.stats()
    if lengths != [output_len] * num_seqs:
        raise RuntimeError("an output has the wrong length")
    started = next(i for i, (tokens, _) in enumerate(counts) if tokens > STEADY_PROMPT)
    ended = next(i for i, (_, tokens) in enumerate(counts) if tokens == STEADY_PROMPT + output_len)
    first, last = started + STEADY_MARGIN, ended - STEADY_MARGIN
    num_steps = last - first
    gaps = [1e3 * (b - a) for a, b in zip(times[first:last], times[first + 1 :], strict=False)]
    ms = 1e3 * (times[last] - times[first]) / num_steps
    context = (counts[first][0] + counts[last][1]) // 2
    floor_ms = 1e3 * _decode_floor_s(model, _ceilings(args), num_seqs, context)
    host_s = stats.host_time_s - before.host_time_s
    result = {
        "sequences": num_seqs,
        "prompt_tokens": STEADY_PROMPT,
        "output_tokens": output_len,
        "ms_an_output_token": ms,
        "median_step_ms": statistics.median(gaps),
        "longest_step_ms": max(gaps),
        "steps": num_steps,
        "tok_s": 1e3 * num_seqs / ms,
        "host_ms_a_step": 1e3 * host_s / len(times),
        "all_started_s": times[started],
        "seconds": times[-1],
        "floor_ms": floor_ms,
        "fraction": floor_ms / ms,
    }
    keys = ("ms_an_output_token", "median_step_ms", "tok_s", "floor_ms", "fraction")
    return result, [num_seqs, *(result[key] for key in keys)]


def _decode_floor_s(model: ModelShape, ceilings: Ceilings, batch: int, context: int) -> float:
    parts = step_floor_s(
        model, ceilings, num_tokens=batch, num_sampled=batch, decode_context=batch * context
    )
    return sum(parts.values())


def _ceilings(args: argparse.Namespace) -> Ceilings:
    return Ceilings(
        read_bytes_s=1e12 * args.read_tb_s,
        matmul_flop_s=1e12 * args.matmul_tflop_s,
        prefill_flop_s=1e12 * args.prefill_tflop_s,
    )


def load_lengths(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Prompt and output length of the trace's first requests that are short enough."""
    loader = common.load_workloads(args.workloads)
    requests = loader.load(args.trace, limit=args.requests, max_total=args.max_total)
    return [(request.prompt_tokens, request.output_tokens) for request in requests]


def parse_args() -> argparse.Namespace:
    h200 = Ceilings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    dummy_model.add_config_argument(parser)
    add("--workloads", type=Path, help="folder of request lengths")
    add("--trace", choices=("azure_conv", "sharegpt_single"), default="azure_conv")
    add("--requests", type=int, default=1000)
    add("--max-total", type=int, default=MAX_MODEL_LEN, help="tokens of a request at most")
    add("--steady", type=int, metavar="S", help="S equal requests instead of a trace")
    add("--steady-output", type=int, default=STEADY_OUTPUT, help="tokens of each of those")
    add("--max-num-seqs", type=int, default=1024)
    add("--max-num-batched-tokens", type=int, default=16384)
    add("--max-logprobs", type=int, default=20, help="see EngineConfig")
    add("--memory-utilization", type=float, default=0.9)
    add("--read-tb-s", type=float, default=1e-12 * h200.read_bytes_s)
    add("--matmul-tflop-s", type=float, default=1e-12 * h200.matmul_flop_s)
    add("--prefill-tflop-s", type=float, default=1e-12 * h200.prefill_flop_s)
    common.add_output_argument(parser)
    args = parser.parse_args()
    if args.steady is None and args.workloads is None:
        parser.error("--workloads is needed, or --steady")
    if args.steady is not None and not 1 <= args.steady <= args.max_num_seqs:
        parser.error(f"--steady must be in [1, {args.max_num_seqs}]")
    if args.steady_output <= 4 * STEADY_MARGIN:
        parser.error(f"--steady-output must be more than {4 * STEADY_MARGIN}")
    return args


def main() -> None:
    args = parse_args()
    lengths = [] if args.steady else load_lengths(args)
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        llm = make_llm(args, directory)
        start_s = time.perf_counter() - start
        print(f"engine started in {start_s:.1f} s", file=sys.stderr, flush=True)
    with llm:
        start = time.perf_counter()
        steady = [(STEADY_PROMPT, args.steady_output)] * (args.steady or 0)
        works = simulate(llm, steady or lengths)
        num_programs = compile_for(llm, works)
        compile_s = time.perf_counter() - start
        print(f"{num_programs} programs in {compile_s:.1f} s", file=sys.stderr, flush=True)
        results: dict[str, Any] = {
            "benchmark": "throughput",
            "model": {
                "name": args.config,
                **dataclasses.asdict(dummy_model.model_shape(args.config)),
            },
            "dtype": "bfloat16",
            "max_num_seqs": args.max_num_seqs,
            "max_num_batched_tokens": args.max_num_batched_tokens,
            "max_model_len": args.max_total,
            "num_blocks": llm.stats().num_blocks,
            "programs": num_programs,
            "engine_start_s": start_s,
            "compile_s": compile_s,
            "ceilings": dataclasses.asdict(_ceilings(args)),
        }
        if args.steady:
            results["steady"], row = run_steady(llm, args)
            header = ["sequences", "ms/token", "median step ms", "tok/s", "floor ms", "fraction"]
        else:
            results["offline"], row = run_trace(llm, lengths, works, args)
            header = ["trace", "s", "tok/s", "output tok/s", "steps", "floor s", "fraction"]
    common.print_table(header, [row])
    if args.steady is None:
        kinds = results["offline"]["by_kind"]
        rows = [[name, k["steps"], k["seconds"], k["floor_s"]] for name, k in kinds.items()]
        common.print_table(["kind of step", "steps", "s", "floor s"], rows)
    common.finish(results, args.json)


if __name__ == "__main__":
    main()
