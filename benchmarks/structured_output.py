"""What keeping to a JSON schema costs a token, beside free text of the same length.

Usage: python benchmarks/structured_output.py [--batch 1 16 64] [--max-tokens 32] [--json FILE]

The same engine, prompts and number of tokens on all sides; they run in turn, and the fastest of
the repeats counts. The schema describes a list of objects that is longer than the output may be.

  free         no structured output; steps are dispatched before the last one is read
  schema       every request has the schema: each step waits for the masks of the last one's tokens
  quarter      a quarter of the requests has it (at least one), the others are free: it takes part
               in every other step, and the others in all
  ms/token     time of the run over the tokens of one request
  host ms      of a step: scheduling, filling inputs, sending masks
  ratio        of time to that of free text
  cpu ratio    the same of the process's own processor time, which says more where other work
               disturbs the machine
  mask us      of a token: following the grammar and computing the mask, by itself in one thread
"""

import argparse
import dataclasses
import time
from typing import Any

import common
import numpy as np

from jpaged import LLM, SamplingParams, StructuredOutputsParams
from jpaged.structured_outputs import GrammarCompiler, GrammarMatcher, mask_width

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z]+@[a-z]+\\.com$"},
        "role": {"enum": ["reader", "writer", "owner"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "email", "role", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 500}
PROMPT = "A list of people as JSON: "


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One side of one round."""

    seconds: float
    cpu_seconds: float
    host_seconds_per_step: float
    num_steps: int
    token_ids: list[list[int]]


def run(llm: LLM, params: list[SamplingParams]) -> Measured:
    """Runs one request for each of the parameters."""
    before = llm.stats()
    start, cpu_start = time.perf_counter(), time.process_time()
    outputs = llm.generate([PROMPT] * len(params), params, use_tqdm=False)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    after = llm.stats()
    num_steps = after.scheduler.num_steps - before.scheduler.num_steps
    host = (after.host_time_s - before.host_time_s) / num_steps
    token_ids = [output.outputs[0].token_ids for output in outputs]
    return Measured(seconds, cpu_seconds, host, num_steps, token_ids)


def compare(llm: LLM, batch: int, max_tokens: int, repeats: int) -> dict[str, Any]:
    """All sides in turn."""
    form = StructuredOutputsParams(json=SCHEMA)
    free = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True)
        for seed in range(batch)
    ]
    bound = [dataclasses.replace(p, ignore_eos=False, structured_outputs=form) for p in free]
    num_bound = max(batch // 4, 1)
    sides = {"free": free, "schema": bound, "quarter": [*bound[:num_bound], *free[num_bound:]]}
    runs: dict[str, list[Measured]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, params in sides.items():
            measured = run(llm, params)
            lengths = {len(token_ids) for token_ids in measured.token_ids}
            assert lengths == {max_tokens}, "an output ended early"
            if repeat:  # the first compiles
                runs[name].append(measured)
    seconds = {name: min(one.seconds for one in found) for name, found in runs.items()}
    cpu = {name: min(one.cpu_seconds for one in found) for name, found in runs.items()}
    result: dict[str, Any] = {"batch": batch, "max_tokens": max_tokens}
    for name, found in runs.items():
        result[name] = {
            "seconds": [one.seconds for one in found],
            "cpu_seconds": [one.cpu_seconds for one in found],
            "num_steps": found[0].num_steps,
            "ms_per_token": seconds[name] / max_tokens * 1e3,
            "host_ms_per_step": min(one.host_seconds_per_step for one in found) * 1e3,
            "ratio": seconds[name] / seconds["free"],
            "cpu_ratio": cpu[name] / cpu["free"],
        }
    return result


def mask_time(llm: LLM, max_tokens: int) -> float:
    """Seconds a token takes for its grammar alone."""
    engine = llm.engine
    vocab_size = engine.model_config.vocab_size
    compiler = GrammarCompiler(llm.get_tokenizer(), vocab_size, engine.eos_token_ids)
    form = StructuredOutputsParams(json=SCHEMA)
    params = SamplingParams(temperature=1.0, max_tokens=max_tokens, structured_outputs=form)
    outputs = run(llm, [params] * 4).token_ids
    masks = np.zeros((1, mask_width(vocab_size)), np.int32)
    seconds = []
    for token_ids in outputs:
        matcher = GrammarMatcher(compiler.compile(form))
        start = time.perf_counter()
        for token_id in token_ids:
            compiler.fill([matcher], masks)
            matcher.advance(token_id)
        seconds.append((time.perf_counter() - start) / len(token_ids))
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="the default model if not given")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    common.add_output_argument(parser)
    args = parser.parse_args()
    if min(args.max_tokens, args.repeats, *args.batch) < 1:
        parser.error("--batch, --max-tokens and --repeats must be at least 1")

    options: dict[str, Any] = {"model": args.model} if args.model else {}
    with LLM(
        **options,
        max_num_seqs=max(args.batch),
        max_num_batched_tokens=max(512, max(args.batch)),
        max_model_len=64 + args.max_tokens,
        compilation="lazy",
    ) as llm:
        cases = [compare(llm, batch, args.max_tokens, args.repeats) for batch in args.batch]
        mask_s = mask_time(llm, args.max_tokens)

    rows = [
        [case["batch"], name, *(case[name][key] for key in _COLUMNS.values())]
        for case in cases
        for name in ("free", "schema", "quarter")
    ]
    common.print_table(["batch", "side", *_COLUMNS], rows)
    print(f"mask us: {mask_s * 1e6:.1f}")
    result = {"benchmark": "structured_output", "cases": cases, "mask_us": mask_s * 1e6}
    common.finish(result, args.json)


_COLUMNS = {
    "steps": "num_steps",
    "ms/token": "ms_per_token",
    "host ms": "host_ms_per_step",
    "ratio": "ratio",
    "cpu ratio": "cpu_ratio",
}

if __name__ == "__main__":
    main()
