"""Host time of the scheduler for thousands of sequences, in microseconds a sequence.

Usage: python benchmarks/scheduler.py [--num-seqs 10000] [--repeats 5]

Every phase calls the real scheduler and block manager as the engine does, one step ahead of the
tokens; there is no device. Prints a table, then one JSON object. Times are the process's own CPU
time, collection of garbage included: the fastest of the repeats, and their median.

  admission      add_request and the step that admits all; prompts of 64 tokens, nothing cached
  admission_hit  the same with the whole prompt cached
  decode         a step without new blocks: schedule alone
  decode_block   a step in which every sequence gets a block
  append         append_token, averaged over a block's worth of tokens, registration included
  preemption     the step in which every fifth sequence gives its blocks to the four others, a
                 preempted sequence
  finish         finish_sequence of all, and the step that drops them
"""

import argparse
import gc
import random
import statistics
import time

import common

from jpaged.block_manager import BlockManager
from jpaged.config import SchedulerConfig
from jpaged.request import Request
from jpaged.sampling_params import SamplingParams
from jpaged.scheduler import Scheduler
from jpaged.scheduler_output import SchedulerOutput

BLOCK_SIZE = 16
PROMPT_LENGTH = 64


def make_scheduler(num_seqs: int, num_blocks: int) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * (PROMPT_LENGTH + 1),
        max_model_len=4096,
        admission_watermark=0.0,
    )
    return Scheduler(config, BlockManager(num_blocks, BLOCK_SIZE))


def make_requests(num_seqs: int, rng: random.Random) -> list[Request]:
    params = SamplingParams(max_tokens=64)
    return [
        Request(str(i), [rng.randrange(50_000) for _ in range(PROMPT_LENGTH)], params)
        for i in range(num_seqs)
    ]


def append(scheduler: Scheduler, output: SchedulerOutput) -> None:
    for seq, samples in zip(output.seqs, output.samples, strict=True):
        if samples:
            scheduler.append_token(seq, 17)


def run_once(num_seqs: int, rng: random.Random) -> dict[str, float]:
    """Microseconds a sequence of every phase."""
    seconds: dict[str, float] = {}
    clock = time.process_time

    scheduler = make_scheduler(num_seqs, num_blocks=8 * num_seqs)
    requests = make_requests(num_seqs, rng)
    start = clock()
    for request in requests:
        scheduler.add_request(request)
    output = scheduler.schedule()
    seconds["admission"] = clock() - start
    assert len(output.admitted) == num_seqs

    decode, block, appended = [], [], []
    for _ in range(2 * BLOCK_SIZE):
        start = clock()
        following = scheduler.schedule()
        between = clock()
        append(scheduler, output)
        end = clock()
        (block if following.table_updates else decode).append(between - start)
        appended.append(end - between)
        output = following
        assert output.num_decodes == num_seqs
    seconds["decode"] = statistics.median(decode)
    seconds["decode_block"] = statistics.median(block)
    seconds["append"] = statistics.mean(appended)

    start = clock()
    for request in requests:
        scheduler.finish_sequence(request.sequences[0], "stop")
    scheduler.schedule()
    seconds["finish"] = clock() - start
    assert scheduler.stats().blocks.used == 0

    again = [Request(r.request_id, [*r.prompt_token_ids, 1], r.sampling_params) for r in requests]
    start = clock()
    for request in again:
        scheduler.add_request(request)
    output = scheduler.schedule()
    seconds["admission_hit"] = clock() - start
    assert output.num_batched_tokens == num_seqs

    # The pool is full and all need a block: each of the last gives its four to the first.
    scheduler = make_scheduler(num_seqs, num_blocks=4 * num_seqs + 1)
    for request in make_requests(num_seqs, rng):
        scheduler.add_request(request)
    append(scheduler, scheduler.schedule())
    start = clock()
    output = scheduler.schedule()
    seconds["preemption"] = (clock() - start) * num_seqs / len(output.preempted)
    assert len(output.seqs) + len(output.preempted) == num_seqs
    scheduler.check_invariants()

    return {phase: 1e6 * value / num_seqs for phase, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-seqs", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    common.add_output_argument(parser)
    args = parser.parse_args()
    if args.num_seqs < 10 or args.repeats < 1:
        parser.error("--num-seqs must be at least 10 and --repeats at least 1")

    rng, runs = random.Random(0), []
    for _ in range(args.repeats):
        gc.collect()
        runs.append(run_once(args.num_seqs, rng))
    phases = {
        phase: {
            "fastest_us": round(min(run[phase] for run in runs), 3),
            "median_us": round(statistics.median(run[phase] for run in runs), 3),
        }
        for phase in runs[0]
    }
    print(f"{args.num_seqs} sequences, block size {BLOCK_SIZE}, microseconds a sequence")
    rows = [[phase, v["fastest_us"], v["median_us"]] for phase, v in phases.items()]
    common.print_table(["phase", "fastest", "median"], rows)
    result = {
        "benchmark": "scheduler",
        "num_seqs": args.num_seqs,
        "block_size": BLOCK_SIZE,
        "prompt_length": PROMPT_LENGTH,
        "repeats": args.repeats,
        "clock": "process_time",
        "phases": phases,
    }
    common.finish(result, args.json)


if __name__ == "__main__":
    main()
