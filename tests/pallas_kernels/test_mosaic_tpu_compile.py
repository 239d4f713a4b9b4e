"""The TPU kernels compiled for real TPUs on this host, where `libtpu` is installed."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from benchmarks.tpu_compile import CHIPS, prepare, problems

ROOT = Path(__file__).parents[2]
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
QUICK = (
    "attention_decode_16",
    "write_kv_16_of_64_tokens",
    "rope_write_kv_16_of_64_tokens",
    "copy_blocks_16",
    "smollm2_attention_decode",
    "smollm2_rope_write_kv",
    "smollm2_copy_blocks",
)

needs_libtpu = pytest.mark.skipif(
    not HAS_LIBTPU, reason="the TPU compiler is not installed: pip install libtpu"
)


def _compile(chip, names):
    # libtpu reads its environment before JAX starts, once: a process of its own.
    command = [sys.executable, "-m", "benchmarks.tpu_compile", "--chip", chip, "--only", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    results = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(results) == list(names)
    for problem in problems():
        if problem.name not in results:
            continue
        result = results[problem.name]
        # The limit; they take up to 4 s on an idle machine.
        assert result["compile_s"] < 30
        pool_bytes = max(
            math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in problem.args
        )
        assert result["temp_bytes"] < pool_bytes / 2, "the pool must not be copied"
        if problem.donated is not None:
            assert result["alias_bytes"] == pool_bytes


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_kernels_compile(chip):
    _compile(chip, QUICK)


@needs_libtpu
@pytest.mark.tpu_compile
@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_compiles(chip):
    _compile(chip, [problem.name for problem in problems()])


@pytest.mark.skipif(HAS_LIBTPU, reason="it is installed")
def test_says_what_is_missing():
    with pytest.raises(RuntimeError, match="needs the TPU compiler: pip install libtpu"):
        prepare("v6e")
