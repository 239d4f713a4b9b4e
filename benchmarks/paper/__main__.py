"""The PagedAttention paper's figures, from this repository's scheduler and block manager.

Usage: python -m benchmarks.paper --workloads DIR [--quick] [--only 12 13] [--out DIR] [--no-plots]

Simulates OPT-13B on the paper's GPU with real request lengths: the real scheduler against
re-implementations of the paper's baselines, a step-time model in place of the device. Writes one
JSON object and one PNG a figure, prints every claim with its value and bound, then one JSON object.
docs/paper.md says what came out and what it rests on. --quick takes minutes of simulated time
instead of an hour: it shows that everything runs, its numbers mean nothing.
"""

import argparse
import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import common
from benchmarks.paper import figures
from benchmarks.paper.experiments import Pool

RESULTS: Final = Path(__file__).parents[1] / "results" / "paper"

EXPERIMENTS: Final = {
    "calibration": figures.calibration,
    "2": figures.figures_2_and_13,
    "12": figures.figure_12,
    "14": figures.figure_14,
    "15": figures.figure_15,
    "16": figures.figure_16,
    "17": figures.figure_17,
    "18b": figures.figure_18b,
    "19": figures.figure_19,
    "watermark": figures.watermark,
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the figures asked for; the summary."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workloads", type=Path, required=True, help="folder of request lengths")
    parser.add_argument("--quick", action="store_true", help="that it runs, not what comes out")
    names = ", ".join(EXPERIMENTS)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="FIGURE", help=names)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and PNG")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--no-plots", action="store_true", help="do without matplotlib")
    args = parser.parse_args(arguments)
    if args.quick and args.out == RESULTS:
        parser.error("--quick needs --out: its numbers do not belong among the results")
    if not args.no_plots and importlib.util.find_spec("matplotlib") is None:
        parser.error('plots need matplotlib: pip install "jpaged[plots]", or give --no-plots')
    common.load_workloads(args.workloads)

    pool = Pool(args.workers)
    bench = figures.Bench(args.workloads, pool, args.quick)
    checks: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    try:
        for name, experiment in EXPERIMENTS.items():
            if args.only and name not in args.only:
                continue
            start = time.perf_counter()
            reports = experiment(bench)
            seconds[name] = round(time.perf_counter() - start, 1)
            for report in reports if isinstance(reports, list) else [reports]:
                common.write(report, args.out / f"figure_{report['figure']}.json")
                checks += [{"figure": report["figure"], **c} for c in report["checks"]]
                if not args.no_plots:
                    from benchmarks.paper import plots

                    plots.draw(report, args.out)
            print(f"{name}: {seconds[name]} s", flush=True)
    finally:
        pool.close()
    rows = [[c["figure"], c["claim"], c["value"], c["at_least"], c["holds"]] for c in checks]
    common.print_table(["figure", "claim", "value", "at least", "holds"], rows)
    summary = {"benchmark": "paper", "quick": args.quick, "seconds": seconds, "checks": checks}
    common.finish(summary, args.out / "summary.json")
    return summary


if __name__ == "__main__":
    main()
