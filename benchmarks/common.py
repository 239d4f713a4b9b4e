"""What the benchmarks share: where they ran, a table for people, one JSON object for machines."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "numpy", "torch", "transformers", "tpu-inference")


def environment() -> dict[str, Any]:
    """Machine, versions and commit of this run."""
    import jax

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit or None,
        # Where the files lie on this machine is nobody's business.
        "command": " ".join(Path(arg).name if arg.startswith("/") else arg for arg in sys.argv),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints aligned columns."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:.0f}"
        if (isinstance(value, float))
        else str(value)
    )


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--json FILE`."""
    parser.add_argument("--json", type=Path, help="write the JSON object to this file as well")


def finish(results: dict[str, Any], file: Path | None) -> None:
    """Prints the JSON object, and writes it to the file if one is given."""
    print(json.dumps({"environment": environment(), **results}))
    if file is not None:
        write(results, file)
        print(f"written: {file}", file=sys.stderr)


def write(results: dict[str, Any], file: Path | None) -> None:
    """Writes the JSON object, or what there is of it so far, if a file is given."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment(), **results}
        file.write_text(json.dumps(report, indent=1) + "\n")


def load_workloads(directory: Path) -> Any:
    """The loader module of a folder of workloads."""
    import importlib.util

    path = directory / "load_workloads.py"
    if not path.is_file():
        raise SystemExit(f"no workloads in {directory}: give their folder with --workloads")
    spec = importlib.util.spec_from_file_location("load_workloads", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
