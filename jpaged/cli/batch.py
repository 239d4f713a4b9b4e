"""Many prompts from a file to JSON lines; a row that cannot be run costs only itself."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jpaged.cli import engine, prompts
from jpaged.cli.streaming import watching, write_text
from jpaged.sampling_params import SamplingParams

_OWN_FIELDS = (*prompts.PROMPT_FIELDS, "id", "priority", "cache_salt")

Row = Mapping[str, Any] | ValueError


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """A row that is run, and the result that is to be filled in."""

    result: dict[str, Any]
    row: Mapping[str, Any]
    prompt: Any
    params: SamplingParams
    priority: int


def run(args: argparse.Namespace, rows: Sequence[Row], options: Mapping[str, Any]) -> int:
    """Runs every row and writes one JSON line for each, in their order.

    Args:
        args: Arguments of `jpaged generate`.
        rows: Parsed lines of the file, or what was wrong with one.
        options: Sampling parameters of rows that do not set their own.

    Returns:
        The exit code: 1 if a row could not be run.
    """
    _check_output(args.output)
    results: list[dict[str, Any]] = [{"index": i} for i in range(len(rows))]
    for result, row in zip(results, rows, strict=True):
        if isinstance(row, ValueError):
            result["error"] = str(row)
        elif "id" in row:
            result["id"] = row["id"]
    num_tokens = num_prompt_tokens = 0
    elapsed_s = 0.0
    if any("error" not in result for result in results):
        defaults = engine.LONE_REQUEST if len(rows) == 1 else {}
        with engine.make_llm(defaults | engine.engine_options(args)) as llm:
            outputs, elapsed_s = _generate(args, llm, rows, options, results)
        num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        num_tokens = sum(len(part.token_ids) for output in outputs for part in output.outputs)
    _write(args.output, results)
    num_failed = sum("error" in result for result in results)
    if num_failed or not args.quiet:
        failed = f", {num_failed} failed" if num_failed else ""
        print(
            f"jpaged: {len(rows)} prompts{failed}, {num_prompt_tokens} prompt tokens, {num_tokens} "
            f"tokens in {elapsed_s:.1f} s, {num_tokens / max(elapsed_s, 1e-9):.1f} tokens/s",
            file=sys.stderr,
        )
    return 1 if num_failed else 0


def _generate(args, llm, rows, options, results) -> tuple[list[Any], float]:
    """Fills in `results`; returns the engine's outputs and the seconds it took over them."""
    jobs: list[_Job] = []
    for result, row in zip(results, rows, strict=True):
        if "error" in result:
            continue
        try:
            job = _make_job(llm, row, options, args, result)
            llm.validate_request(job.prompt, job.params)
        except ValueError as error:
            result["error"] = str(error)
        else:
            jobs.append(job)
    if not jobs:
        return [], 0.0
    start = time.perf_counter()
    with watching(args, llm):
        outputs = llm.generate(
            [job.prompt for job in jobs],
            [job.params for job in jobs],
            use_tqdm=not (args.quiet or args.watch) and sys.stderr.isatty(),
            priority=[job.priority for job in jobs] if _by_priority(args) else None,
        )
    elapsed_s = time.perf_counter() - start
    for job, output in zip(jobs, outputs, strict=True):
        job.result.update(_result(job, output))
    return outputs, elapsed_s


def _make_job(llm, row, options, args, result) -> _Job:
    own = {name: value for name, value in row.items() if name not in _OWN_FIELDS}
    if isinstance(bias := own.get("logit_bias"), Mapping):
        # JSON knows no other keys than strings.
        own["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in bias.items()}
    params = engine.sampling_params({**options, **own}, delta=False)
    priority = row.get("priority", 0)
    if type(priority) is not int:
        raise ValueError(f"priority must be an integer, got {priority!r}")
    if priority and not _by_priority(args):
        raise ValueError(f"priority needs --policy priority, got {priority}")
    prompt = prompts.from_row(llm, row, raw=args.raw, system=args.system)
    return _Job(result, row, prompt, params, priority)


def _by_priority(args: argparse.Namespace) -> bool:
    return engine.engine_options(args).get("policy") == "priority"


def _result(job: _Job, output: Any) -> dict[str, Any]:
    with_logprobs = job.params.logprobs is not None
    result = {name: job.row[name] for name in prompts.PROMPT_FIELDS if name in job.row}
    result["outputs"] = [
        {
            "text": part.text,
            "token_ids": list(part.token_ids),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }
        | ({"logprobs": _positions(part.logprobs)} if with_logprobs else {})
        | ({"score": part.score} if job.params.use_beam_search else {})
        for part in output.outputs
    ]
    if output.prompt_logprobs is not None:
        result["prompt_logprobs"] = _positions(output.prompt_logprobs)
    result["num_prompt_tokens"] = len(output.prompt_token_ids)
    result["num_cached_tokens"] = output.num_cached_tokens
    return result


def _positions(positions: Any) -> list[dict[str, Any] | None]:
    """Log-probabilities by position and token id, as JSON can hold them."""
    return [
        position
        and {
            str(token): {
                "logprob": entry.logprob,
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token, entry in position.items()
        }
        for position in positions or ()
    ]


def _check_output(path: str | None) -> None:
    """Refuses a path that cannot be written, before any work; an earlier file keeps its content."""
    if path is None or path == "-":
        return
    try:
        Path(path).open("a").close()
    except OSError as error:
        raise ValueError(f"cannot write --output {path}: {error.strerror}") from error


def _write(path: str | None, results: Sequence[Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    if path is None or path == "-":
        write_text(lines)
    else:
        Path(path).write_text(lines, encoding="utf-8")
