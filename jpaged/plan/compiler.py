"""Compiling for targets, from the side that asks for it: in processes for many programs each."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile

from jpaged.plan.compile_target import Compiled, Job, environment


class Compiler:
    """A process that compiles one step after another, started with the first; not thread-safe.

    Python, JAX and the TPU compiler start once for all of them. To be closed.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        # Not a pipe: nobody reads it while the process writes.
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (see `close`)

    def compile(self, job: Job) -> Compiled:
        """Compiles a step; takes a core for as long as it runs.

        Raises:
            RuntimeError: The compiler is not installed, or the process ended.
        """
        check_installed()
        if self._process is None:
            self._process = self._start(job)
        reply = _ask(self._process, json.dumps(dataclasses.asdict(job)))
        if not reply:
            self._end()
            self._stderr.seek(0)
            lines = self._stderr.read().strip().splitlines() or ["it said nothing"]
            where = f"compiling for {job.topology_name} failed"
            raise RuntimeError("\n".join((f"{where}: {lines[-1]}", *lines)))
        return Compiled(**json.loads(reply))

    def close(self) -> None:
        """Ends the process."""
        self._end()
        self._stderr.close()

    def _start(self, job: Job) -> subprocess.Popen[str]:
        self._stderr.seek(0)
        self._stderr.truncate()
        return subprocess.Popen(
            [sys.executable, "-m", "jpaged.plan.compile_target"],
            env=os.environ | environment(job),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            # It keeps nothing that it would have to put away.
            process.kill()
            process.communicate()


class Compilers:
    """As many compilers as are asked at once; from any thread. To be closed."""

    def __init__(self) -> None:
        self._all: list[Compiler] = []
        self._idle: queue.LifoQueue[Compiler] = queue.LifoQueue()

    def compile(self, job: Job) -> Compiled:
        """As `Compiler.compile`, by one that has nothing else to do."""
        try:
            compiler = self._idle.get_nowait()
        except queue.Empty:
            compiler = Compiler()
            self._all.append(compiler)
        try:
            return compiler.compile(job)
        finally:
            self._idle.put(compiler)

    def close(self) -> None:
        """Ends their processes."""
        for compiler in self._all:
            compiler.close()


def compile_job(job: Job) -> Compiled:
    """Compiles one step in a process of its own.

    Raises:
        RuntimeError: See `Compiler.compile`.
    """
    with contextlib.closing(Compiler()) as compiler:
        return compiler.compile(job)


def check_installed() -> None:
    """Makes sure that there is a TPU compiler.

    Raises:
        RuntimeError: There is none.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("a TPU target needs the TPU compiler: pip install libtpu")


def _ask(process: subprocess.Popen[str], line: str) -> str:
    """Returns the line that a process answers; empty if it ends instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline()
