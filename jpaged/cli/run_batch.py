"""`jpaged run-batch`: a file of requests in OpenAI's batch format, run without a server."""

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from jpaged.cli import engine, serve

if TYPE_CHECKING:
    from jpaged.serving.batch import BatchCounts
    from jpaged.serving.batch_files import BatchLine, BatchOutput
    from jpaged.serving.in_process import InProcessEngine

_OPEN_PER_SEQUENCE = 2  # a request is at hand wherever another ends
_NEEDS = 'jpaged run-batch needs: pip install "jpaged[serve]"'


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    options = engine.engine_options(args)
    try:
        from jpaged.serving import batch_files
        from jpaged.serving.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise ValueError(f"{_NEEDS} (there is no {error.name})") from None
    settings = serve.server_options(args)
    settings.pop("api_keys", None)  # nobody comes from outside
    server_settings = ServerSettings(**settings, enable_request_id_headers=True)
    _check_files(args.input_file, args.output_file)
    lines = batch_files.read_lines(args.input_file)
    with batch_files.BatchOutput(args.output_file) as output:
        if (stranger := next(batch_files.unknown_ids(output, lines), None)) is not None:
            raise ValueError(
                f"--output-file {args.output_file} has results of another input "
                f"(custom_id {stranger!r}): name another file, or remove it"
            )
        left = [line for line in lines if not output.has(line)]
        counts = asyncio.run(_run(options, server_settings, left, output)) if left else None
        num_failed = output.num_failed + (counts.num_failed if counts else 0)
    _tell(len(lines), len(lines) - len(left), num_failed, counts)
    return 1 if num_failed else 0


def _check_files(input_file: str, output_file: str) -> None:
    if "://" in output_file:
        raise ValueError(f"--output-file must be a file of this machine, got {output_file}")
    exist = os.path.exists(input_file) and os.path.exists(output_file)
    if exist and os.path.samefile(input_file, output_file):
        raise ValueError(f"--input-file and --output-file must differ, got {input_file} twice")


async def _run(
    options: Mapping[str, Any],
    settings: Any,
    lines: "list[BatchLine]",
    output: "BatchOutput",
) -> "BatchCounts":
    from jpaged.serving.app import create_app
    from jpaged.serving.batch import run_batch

    running = await asyncio.to_thread(make_engine, options)
    try:
        with tqdm(total=len(lines), unit="req", disable=None) as progress:
            return await run_batch(
                create_app(running, settings),
                running,
                lines,
                output,
                concurrency=_OPEN_PER_SEQUENCE * running.info.max_num_seqs,
                on_result=progress.update,
            )
    finally:
        await running.shutdown()


def make_engine(options: Mapping[str, Any]) -> "InProcessEngine":
    """The engine with these options; the first place where JAX is imported."""
    from jpaged.async_engine import AsyncLLM
    from jpaged.serving.in_process import InProcessEngine

    return InProcessEngine(AsyncLLM(**options))


def _tell(num_lines: int, num_kept: int, num_failed: int, counts: "BatchCounts | None") -> None:
    parts = [f"{num_lines} requests"]
    if num_failed:
        parts.append(f"{num_failed} failed")
    if num_kept:
        parts.append(f"{num_kept} kept from before")
    if counts is not None:
        speed = counts.num_tokens / max(counts.elapsed_s, 1e-9)
        parts.append(f"{counts.num_prompt_tokens} prompt tokens")
        parts.append(f"{counts.num_tokens} tokens in {counts.elapsed_s:.1f} s")
        parts.append(f"{speed:.1f} tokens/s")
    print(f"jpaged: {', '.join(parts)}", file=sys.stderr)
