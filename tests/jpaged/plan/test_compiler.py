"""Processes that compile, played by a script that answers a job with its own id."""

import concurrent.futures
import contextlib
import dataclasses
import os
import sys

import pytest

from jpaged.plan import compiler
from jpaged.plan.compile_target import Job
from jpaged.plan.compiler import Compiler, Compilers

SCRIPT = """#!{python}
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)
    if job["num_tokens"] == 13:
        sys.exit("no program for 13 tokens")
    time.sleep(job["num_seqs"] / 10)
    print(json.dumps({{"cycles": os.getpid()}}), flush=True)
"""
JOB = Job(
    topology_name="v6e:2x2",
    accelerator_type="v6e-4",
    model="tiny",
    dtype="bfloat16",
    tensor_parallel_size=1,
    block_size=16,
    num_blocks=8,
    max_model_len=64,
    max_num_seqs=8,
    max_logprobs=0,
    num_tokens=8,
    num_seqs=0,
    decode_only=True,
    plain=True,
)
UNLUCKY = dataclasses.replace(JOB, num_tokens=13)


@pytest.fixture(autouse=True)
def script(tmp_path, monkeypatch):
    path = tmp_path / "compile"
    path.write_text(SCRIPT.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setattr(compiler, "check_installed", lambda: None)
    monkeypatch.setattr(compiler.sys, "executable", str(path))


def is_alive(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_process_compiles_all_and_ends_with_its_compiler():
    with contextlib.closing(Compiler()) as one:
        process_id = one.compile(JOB).cycles
        assert one.compile(dataclasses.replace(JOB, topology_name="v5e:2x4")).cycles == process_id
        assert is_alive(process_id)
    assert not is_alive(process_id)


def test_a_process_that_ends_says_why_and_the_next_job_has_another():
    with contextlib.closing(Compiler()) as one:
        first = one.compile(JOB).cycles
        message = "compiling for v6e:2x2 failed: no program for 13 tokens"
        for _ in range(2):
            with pytest.raises(RuntimeError) as error:
                one.compile(UNLUCKY)
            assert str(error.value) == f"{message}\nno program for 13 tokens"
        assert one.compile(JOB).cycles != first


def test_a_compiler_that_says_nothing_is_said(monkeypatch):
    monkeypatch.setattr(compiler.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="compiling for v6e:2x2 failed: it said nothing"):
        compiler.compile_job(JOB)


def test_as_many_processes_run_as_are_asked_at_once():
    slow = dataclasses.replace(JOB, num_seqs=5)
    with contextlib.closing(Compilers()) as compilers:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            both = {done.cycles for done in pool.map(compilers.compile, (slow, slow))}
        assert len(both) == 2
        assert {compilers.compile(JOB).cycles for _ in range(3)} <= both
    assert not any(map(is_alive, both))
