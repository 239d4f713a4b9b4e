"""`jpaged compile`: the programs of an engine, listed or compiled ahead."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from jpaged.cli import engine
from jpaged.cli.streaming import write_text


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    start = time.perf_counter()
    options = engine.engine_options(args)
    options["compilation"] = "lazy" if args.list else "eager"
    options["skip_tokenizer_init"] = True  # no text comes in, so a bare config.json is enough
    with engine.make_llm(options) as llm:
        programs = list(llm.compile_plan.programs)
        write_text(_table(programs, with_times=not args.list))
        elapsed_s = time.perf_counter() - start
    did = "listed" if args.list else "compiled"
    print(f"jpaged: {len(programs)} programs {did} in {elapsed_s:.1f} s", file=sys.stderr)
    return 0


def _table(programs: Sequence[Any], *, with_times: bool) -> str:
    header = ["program", "kind", "tokens", "sequences", "state"]
    rows = [
        [program.name, program.kind, str(program.num_tokens), str(program.num_seqs), program.state]
        for program in programs
    ]
    if with_times:
        header.append("seconds")
        for row, program in zip(rows, programs, strict=True):
            seconds = program.compile_time_s
            row.append("" if seconds is None else f"{seconds:.2f}")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    numeric = {"tokens", "sequences", "seconds"}
    lines = []
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if name in numeric else cell.ljust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)
