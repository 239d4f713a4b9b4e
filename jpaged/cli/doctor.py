"""`jpaged doctor`: prints what `jpaged.doctor` finds."""

import argparse
import json

from jpaged import doctor
from jpaged.cli.streaming import write_text


def run(args: argparse.Namespace) -> int:
    """Runs the command; exit code 1 says that something is broken."""
    report = doctor.examine()
    write_text(json.dumps(report, indent=2) + "\n" if args.json else doctor.render(report))
    return 1 if report["problems"] else 0
