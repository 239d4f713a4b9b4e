"""`jpaged plan`: what a model would be on hardware that is not here."""

import argparse
import json
import os
import sys
import time

from jpaged.cli import engine
from jpaged.cli.streaming import write_text


def run(args: argparse.Namespace) -> int:
    """Runs the command; exit code 1 says that the model fits none of the targets."""
    # Nothing here needs a device, and a TPU or GPU may be in use.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jpaged.plan import report
    from jpaged.plan.planner import make_plan
    from jpaged.plan.targets import DEFAULT_TARGETS

    start = time.perf_counter()
    names = [name for text in args.target or () for name in text.split(",") if name.strip()]
    plan = make_plan(
        # A name that is only blank is a mistake like any other.
        targets=names or args.target or DEFAULT_TARGETS,
        context_len=args.context_len,
        report_progress=lambda text: print(f"jpaged: {text}", file=sys.stderr),
        **{"model": None, **engine.engine_options(args)},
    )
    if args.json:
        write_text(json.dumps(report.as_json(plan), indent=2) + "\n")
    else:
        write_text(report.render(plan))
    elapsed_s = time.perf_counter() - start
    print(f"jpaged: {len(plan.targets)} targets in {elapsed_s:.1f} s", file=sys.stderr)
    return 1 if all(target.why_not for target in plan.targets) else 0
