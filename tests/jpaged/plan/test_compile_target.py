"""Whole steps compiled for TPUs on this host, where `libtpu` is installed."""

import importlib.util
import json

import pytest

from jpaged.plan import compiler, planner
from jpaged.plan.planner import make_plan
from jpaged.plan.shapes import SHAPES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install libtpu",
)


@pytest.fixture
def compiled(monkeypatch):
    """The jobs that were compiled, and what came of each."""
    found = []

    class KeepingCompilers(compiler.Compilers):
        def compile(self, job):
            found.append((job, super().compile(job)))
            return found[-1][1]

    monkeypatch.setattr(planner, "Compilers", KeepingCompilers)
    return found


def check(plan, compiled):
    """Every byte of the plan is one that the compiler counted."""
    (_, mixed), (job, decode) = compiled
    assert not plan.why_not
    assert job.num_blocks == plan.num_blocks
    pool_bytes = plan.num_blocks * plan.block_bytes
    inputs = mixed.argument_bytes - mixed.pool_bytes - decode.argument_bytes + pool_bytes
    planned = plan.weight_bytes + plan.state_bytes + pool_bytes
    # The two steps differ by the batch, which is a few numbers a token.
    assert 0 <= inputs < 1 << 20
    assert decode.argument_bytes == planned - inputs
    assert planned + plan.temp_bytes <= plan.budget_bytes
    assert plan.temp_bytes >= decode.temp_bytes
    assert plan.decode.compiler_s > 0


def test_memory_is_the_compilers(tmp_path, compiled):
    shape = {
        **SHAPES["tiny"],
        "hidden_size": 512,
        "head_dim": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    [plan] = make_plan(
        str(tmp_path), ["v6e-4"], max_num_seqs=8, max_num_batched_tokens=64, max_model_len=1024
    ).targets
    assert plan.tensor_parallel_size == 4
    check(plan, compiled)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("target", ["v5e-8", "v6e-1", "v6e-8", "v5p-8", "tpu7x-8"])
def test_llama_3_8b_fits(target, compiled):
    [plan] = make_plan("llama-3-8b", [target]).targets
    check(plan, compiled)
