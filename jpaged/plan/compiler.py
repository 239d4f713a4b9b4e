"""A process that compiles for one target, from the side that asks it."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import Self

from jpaged.plan.compile_target import Compiled, Job, environment


class TargetCompiler:
    """Compiles jobs of one target in a process of its own, one after the other."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed on exit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._errors.close()
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "started with both"
            with contextlib.suppress(BrokenPipeError):  # what it did not read anymore
                pipe.close()

    def compile(self, job: Job) -> Compiled:
        """Compiles a step.

        Raises:
            RuntimeError: The compiler is not installed, or the process ended.
        """
        if self._process is None:
            check_installed()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jpaged.plan.compile_target"],
                env=os.environ | environment(job),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None, "started with both"
        assert stdout is not None, "started with both"
        try:
            print(json.dumps(dataclasses.asdict(job)), file=stdin, flush=True)
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or ["it said nothing"]
            where = f"compiling for {job.topology_name} failed"
            raise RuntimeError("\n".join((f"{where}: {lines[-1]}", *lines)))
        return Compiled(**json.loads(answer))


def check_installed() -> None:
    """Makes sure that there is a TPU compiler.

    Raises:
        RuntimeError: There is none.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("a TPU target needs the TPU compiler: pip install libtpu")
