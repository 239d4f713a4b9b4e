"""Compiling for a target, from the side that asks for it: every program in a process of its own."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

from jpaged.plan.compile_target import Compiled, Job, environment


def compile_job(job: Job) -> Compiled:
    """Compiles a step; takes a core for as long as it runs.

    Raises:
        RuntimeError: The compiler is not installed, or the process ended.
    """
    check_installed()
    done = subprocess.run(
        [sys.executable, "-m", "jpaged.plan.compile_target"],
        env=os.environ | environment(job),
        input=json.dumps(dataclasses.asdict(job)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not done.stdout:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        where = f"compiling for {job.topology_name} failed"
        raise RuntimeError("\n".join((f"{where}: {lines[-1]}", *lines)))
    return Compiled(**json.loads(done.stdout))


def check_installed() -> None:
    """Makes sure that there is a TPU compiler.

    Raises:
        RuntimeError: There is none.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("a TPU target needs the TPU compiler: pip install libtpu")
