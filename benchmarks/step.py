"""One decode step of the engine, part by part, against its floor; Llama-3-8B's shapes by default.

Usage: python benchmarks/step.py [--batch 1 8 64 256] [--context 1024] [--profile] [--json FILE]

The engine's own compiled step, with random weights and random K and V. Requests are scheduled up to
their first decode, but their prompts are never run; they are scheduled in chunks of one block, so
that the blocks of a sequence lie scattered over the pool.

  wall     a step of many dispatched in a row, nothing read between them
  kernels  sum of the step's kernels (CUPTI), by part: matrix products, attention (its schedule
           included), sampling, rest; wall less kernels is what the GPU waits
  floor    weights, K and V over the read ceiling or FLOPs over the matmul ceiling, whichever is
           more; ceilings are measured in the same run
  engine   a step of `Engine.step` with scheduling and outputs, and what of it the host works
"""

import argparse
import contextlib
import dataclasses
import functools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import dummy_model
import jax
import kernel_times
import numpy as np
from roofline import Ceilings, ModelShape, step_floor_s

from jpaged import LLM, SamplingParams
from jpaged.engine import Engine
from jpaged.input_batch import InputBatch
from jpaged.model_runner import ModelRunner, StepHandle
from jpaged.sampling_params import RequestOutputKind
from jpaged.scheduler import Scheduler
from jpaged.scheduler_output import SchedulerOutput

BLOCK_SIZE = 16
PARTS = ("gemm", "attention", "sampling", "rest")
# Names of cuBLAS's, CUTLASS's, XLA's and our own matrix products.
_GEMM = re.compile(r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|matmul|linear", re.IGNORECASE)
_ATTENTION = re.compile(r"paged|attention|attend|chunks|combine", re.IGNORECASE)
_SAMPLING = re.compile(r"choose_tokens|token_tiles")
_SAMPLING_FILES = ("sampler.py", "token_choice.py")


def build(args: argparse.Namespace, directory: str) -> LLM:
    """An engine that holds the largest batch; it compiles only what is run."""
    blocks_per_seq = -(-(args.context + args.engine_steps + 8) // BLOCK_SIZE)
    max_num_seqs = max(args.batch)
    return LLM(
        dummy_model.write_config(args.config, directory),
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        compilation="lazy",
        block_size=BLOCK_SIZE,
        # Of a table, which a step uploads whole.
        max_model_len=args.max_model_len,
        num_blocks=max(
            max_num_seqs * blocks_per_seq + 1 + max_num_seqs,
            args.max_model_len // BLOCK_SIZE + 2,
        ),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs * BLOCK_SIZE,
        long_prefill_token_threshold=BLOCK_SIZE,
        max_logprobs=args.max_logprobs,
    )


def fill_pools(runner: ModelRunner) -> None:
    """Random K and V, since a GPU's clock, and so its speed, depends on the data."""
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    pools = list(runner.worker.pools)
    runner.worker.pools = ()
    for i, key in enumerate(jax.random.split(jax.random.key(0), len(pools))):
        shape, dtype = pools[i].shape, pools[i].dtype
        pools[i].delete()
        pools[i] = draw(key, shape, dtype)
    runner.worker.pools = tuple(pools)


def first_decode(engine: Engine, batch: int, context: int, num_steps: int) -> SchedulerOutput:
    """The step in which a batch decodes for the first time, each with this context.

    As in an engine that runs ahead, the tokens to decode are known to the device only.
    """
    rng = np.random.default_rng(0)
    vocab_size = engine.model_config.vocab_size
    params = SamplingParams(
        temperature=0.0,
        ignore_eos=True,
        max_tokens=num_steps + 8,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompts = rng.integers(0, vocab_size, (batch, context - 1)).tolist()
    for i, prompt in enumerate(prompts):
        engine.add_request(engine.make_request(f"batch{batch}-{i}", prompt, params))
    while True:
        scheduled = engine.scheduler.schedule()
        if scheduled.starts[0] == context - 1:
            break
    assert scheduled.num_decodes == len(scheduled.seqs) == batch, "the batch is not in step"
    # What the steps that were not run would have told the runner.
    for seq in scheduled.seqs:
        state: Any = seq.request.engine_state
        engine.runner.admit(seq, state.sampling, False)
    return dataclasses.replace(scheduled, table_updates=[(seq, 0) for seq in scheduled.seqs])


def wall_s(runner: ModelRunner, scheduled: SchedulerOutput, num_steps: int) -> float:
    """Seconds a step of many in a row."""
    runner.dispatch(scheduled).result()
    start = time.perf_counter()
    for _ in range(num_steps - 1):
        runner.dispatch(scheduled)
    runner.dispatch(scheduled).result()
    return (time.perf_counter() - start) / num_steps


class Parts:
    """Which part of a step a kernel belongs to, by its name or by the source it was made from.

    Args:
        hlo: The optimised program, as text.
    """

    def __init__(self, hlo: str) -> None:
        files = dict(re.findall(r'^(\d+) "([^"]*\.py)"$', hlo, re.MULTILINE))
        locations = dict(re.findall(r"^(\d+) \{file_name_id=(\d+) ", hlo, re.MULTILINE))
        frames = dict(re.findall(r"^(\d+) \{file_location_id=(\d+)", hlo, re.MULTILINE))
        self._file_of: dict[str, str] = {}
        pattern = r"^\s*(?:ROOT )?%([\w.-]+) = .*stack_frame_id=(\d+)"
        for name, frame in re.findall(pattern, hlo, re.MULTILINE):
            file = files.get(locations.get(frames.get(frame, ""), ""), "")
            self._file_of[re.sub(r"\W", "_", name)] = file

    def part(self, kernel: str) -> str:
        """One of `PARTS`."""
        file = self._file_of.get(kernel, "")
        if file.endswith(_SAMPLING_FILES) or _SAMPLING.search(kernel):
            return "sampling"
        if "/linear/" in file or _GEMM.search(kernel):
            return "gemm"
        if "paged_attention" in file or ("mosaic_gpu" in kernel and _ATTENTION.search(kernel)):
            return "attention"
        return "rest"


@contextlib.contextmanager
def timed(owner: type, name: str) -> Iterator[list[float]]:
    """Seconds of each call of a method while the context lasts."""
    method: Callable[..., Any] = getattr(owner, name)
    seconds: list[float] = []

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, wrapper)
    try:
        yield seconds
    finally:
        setattr(owner, name, method)


def engine_steps(engine: Engine, num_steps: int) -> dict[str, float]:
    """Median milliseconds of the engine's steps and of what the host does in them."""
    timers = {
        "step": (Engine, "step"),
        "schedule": (Scheduler, "schedule"),
        "fill": (InputBatch, "fill"),
        "dispatch": (ModelRunner, "dispatch"),
        "wait": (StepHandle, "result"),
    }
    with contextlib.ExitStack() as stack:
        times = {key: stack.enter_context(timed(*of)) for key, of in timers.items()}
        engine.step()
        engine.step()
        for seconds in times.values():
            seconds.clear()
        for _ in range(num_steps):
            outputs = engine.step()
            assert not outputs, "a request ended while steps were timed"
    median = {key: 1e3 * statistics.median(seconds) for key, seconds in times.items()}
    return {
        "step_ms": median["step"],
        "schedule_ms": median["schedule"],
        "fill_ms": median["fill"],
        "call_ms": median["dispatch"] - median["fill"],
        "outputs_ms": median["step"] - median["schedule"] - median["dispatch"] - median["wait"],
        "host_ms": median["step"] - median["wait"],
    }


def run_batch(
    llm: LLM, batch: int, model: ModelShape, ceilings: Ceilings, args: argparse.Namespace
) -> dict[str, Any]:
    """Everything about one batch size."""
    engine, runner = llm.engine, llm.engine.runner
    scheduled = first_decode(engine, batch, args.context, args.engine_steps)
    program = runner.plan.find(batch, batch, True, True)
    runner.dispatch(scheduled).result()
    # The tables are with the runner now.
    repeated = dataclasses.replace(scheduled, table_updates=[])
    wall_ms = 1e3 * wall_s(runner, repeated, args.steps)
    times = kernel_times.measure([lambda: runner.dispatch(repeated).result()], args.kernel_steps)
    parts = Parts(program.compiled.as_text())
    floors = step_floor_s(
        model,
        ceilings,
        num_tokens=batch,
        num_sampled=batch,
        decode_context=batch * args.context,
    )
    kernels_ms = 1e3 * times.seconds()
    floor_ms = 1e3 * sum(floors.values())
    result: dict[str, Any] = {
        "batch": batch,
        "context": args.context,
        "program": program.name,
        "compile_s": program.compile_time_s,
        "clock": times.clock,
        "wall_ms": wall_ms,
        "kernels_ms": kernels_ms,
        "gap_ms": wall_ms - kernels_ms,
        "floor_ms": floor_ms,
        "fraction": floor_ms / wall_ms,
        "parts": {},
    }
    for part in PARTS:
        # Bound now: the loop goes on before the lambda would look.
        part_ms = 1e3 * times.seconds(lambda name, part=part: parts.part(name) == part)
        part_floor_ms = 1e3 * floors.get(part, 0.0)
        result["parts"][part] = {
            "launches": sum(
                n for name, (n, _) in times.by_name().items() if parts.part(name) == part
            ),
            "ms": part_ms,
            "floor_ms": part_floor_ms,
            "fraction": part_floor_ms / part_ms if part_ms and part_floor_ms else None,
        }
    result["kernels_us"] = times.kernels_us()
    if args.profile:
        print_profile(result, parts, args.profile)

    # The token that the prompt's last step sampled, and that of the step dispatched by hand.
    for seq in scheduled.seqs:
        for _ in range(seq.num_pending):
            engine.scheduler.append_token(seq, 0)
    result["engine"] = engine_steps(engine, args.engine_steps)
    for seq in scheduled.seqs:
        engine.abort_request(seq.request.request_id)
    while engine.has_unfinished:
        engine.step()
    return result


def print_profile(result: dict[str, Any], parts: Parts, num_kernels: int) -> None:
    """The longest kernels of a step."""
    kernels = list(result["kernels_us"].items())
    rows = [
        [name[:90], parts.part(name), launches, us, us / launches]
        for name, (launches, us) in kernels[:num_kernels]
    ]
    print(f"batch {result['batch']}: the longest of {len(kernels)} kernels")
    common.print_table(["kernel", "part", "launches", "us a step", "us each"], rows)


def print_results(results: list[dict[str, Any]]) -> None:
    """Three tables: whole steps, their parts, the host."""
    keys = ("wall_ms", "kernels_ms", "gap_ms", "floor_ms", "fraction")
    rows = [[r["batch"], *(r[key] for key in keys)] for r in results]
    header = ["batch", "wall ms", "kernels ms", "gap ms", "floor ms", "fraction"]
    common.print_table(header, rows)
    rows = []
    for result in results:
        for part, p in result["parts"].items():
            fraction = p["fraction"] or "-"
            rows.append([result["batch"], part, p["launches"], p["ms"], p["floor_ms"], fraction])
    common.print_table(["batch", "part", "launches", "ms", "floor ms", "fraction"], rows)
    keys = ("step_ms", "host_ms", "schedule_ms", "fill_ms", "call_ms", "outputs_ms")
    rows = [[r["batch"], *(r["engine"][key] for key in keys)] for r in results]
    header = ["batch", "engine step ms", "host ms", "schedule", "fill", "call", "outputs"]
    common.print_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    dummy_model.add_config_argument(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-logprobs", type=int, default=20, help="see EngineConfig")
    parser.add_argument("--steps", type=int, default=40, help="in a row, for the wall time")
    parser.add_argument("--kernel-steps", type=int, default=10, help="for the kernel times")
    parser.add_argument("--engine-steps", type=int, default=40)
    parser.add_argument(
        "--profile", type=int, nargs="?", const=25, default=0, help="print the longest kernels"
    )
    common.add_output_argument(parser)
    args = parser.parse_args()
    if args.context < 2 or args.context + args.engine_steps + 8 > args.max_model_len:
        parser.error("--context must be at least 2 and leave room for the steps")

    ceilings = kernel_times.measure_ceilings()
    model = dummy_model.model_shape(args.config)
    with tempfile.TemporaryDirectory() as directory, build(args, directory) as llm:
        fill_pools(llm.engine.runner)
        results = []
        for batch in args.batch:
            results.append(run_batch(llm, batch, model, ceilings, args))
            print(f"batch {batch}: {results[-1]['wall_ms']:.3f} ms", file=sys.stderr, flush=True)
        num_blocks = llm.stats().num_blocks
    print_results(results)
    report = {
        "benchmark": "step",
        "model": {"name": args.config, **dataclasses.asdict(model)},
        "dtype": "bfloat16",
        "block_size": BLOCK_SIZE,
        "num_blocks": num_blocks,
        "max_model_len": args.max_model_len,
        "ceilings": dataclasses.asdict(ceilings),
        "batches": results,
    }
    common.finish(report, args.json)


if __name__ == "__main__":
    main()
