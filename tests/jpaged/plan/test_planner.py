"""Blocks, speed and refusals, with a compiler that says what a test wants."""

import jax.numpy as jnp
import pytest

from jpaged import memory
from jpaged.engine_config import EngineConfig
from jpaged.models.sharding import local_config
from jpaged.pallas_kernels import KVCacheSpec
from jpaged.plan import compiler, estimate, planner
from jpaged.plan.compile_target import Compiled
from jpaged.plan.models import read_model
from jpaged.plan.planner import make_plan
from jpaged.plan.targets import parse_target

BLOCK_BYTES = 2 << 20  # of Llama-3-8B, 16 tokens
STATE_BYTES = 300_000_000
WEIGHT_BYTES = 16_060_522_496
TEMP_BYTES = 850_000_000


class FakeCompilers:
    """Keeps the jobs; the device's share of memory is even."""

    jobs: list
    error = ""

    def close(self):
        pass

    def compile(self, job):
        self.jobs.append(job)
        if self.error:
            return Compiled(error=self.error)
        size = job.tensor_parallel_size
        pool_bytes = BLOCK_BYTES // size * job.num_blocks
        weight_bytes = WEIGHT_BYTES // size
        return Compiled(
            weight_bytes=weight_bytes,
            pool_bytes=pool_bytes,
            argument_bytes=weight_bytes + pool_bytes + STATE_BYTES,
            temp_bytes=TEMP_BYTES // size,
            cycles=35_000_000 if job.decode_only else 70_000_000,
            compile_s=2.0,
        )


@pytest.fixture
def jobs(monkeypatch):
    FakeCompilers.jobs, FakeCompilers.error = [], ""
    monkeypatch.setattr(planner, "Compilers", FakeCompilers)
    monkeypatch.setattr(planner, "check_installed", lambda: None)
    return FakeCompilers.jobs


def only(*args, **options):
    [plan] = make_plan("llama-3-8b", *args, **options).targets
    return plan


def test_blocks_are_what_is_left_as_the_engine_counts(jobs):
    plan = only(["v6e-1"])
    left = int(parse_target("v6e-1").device.memory_bytes * 0.9)
    left -= WEIGHT_BYTES + STATE_BYTES + TEMP_BYTES
    scheduler = EngineConfig().scheduler_config("tpu", 8192)
    spec = KVCacheSpec(block_size=16, num_kv_heads=8, head_dim=128, dtype=jnp.dtype("bfloat16"))
    blocks = memory.num_blocks(
        EngineConfig(kv_cache_memory_bytes=left),
        scheduler,
        spec,
        num_layers=32,
        step_temp_bytes=lambda blocks: 0,
        devices=(),
    )
    assert plan.num_blocks == blocks
    assert (plan.weight_bytes, plan.state_bytes) == (WEIGHT_BYTES, STATE_BYTES)
    assert plan.temp_bytes == TEMP_BYTES
    assert plan.num_seqs_fit == (blocks - 1) // 64
    assert plan.compile_s == 4.0


def test_the_largest_step_sizes_the_pool_and_the_decode_step_has_it(jobs):
    plan = only(["v6e-1"])
    mixed, decode = jobs
    assert (mixed.num_tokens, mixed.num_seqs, mixed.decode_only, mixed.plain) == (
        2048,
        256,
        False,
        False,
    )
    assert mixed.num_blocks == 8192 // 16 + 1
    assert plan.num_seqs_fit < 128
    assert (decode.num_tokens, decode.num_seqs, decode.decode_only, decode.plain) == (
        128,
        128,
        True,
        True,
    )
    assert decode.num_blocks == plan.num_blocks


def test_large_steps_come_first_and_plans_in_the_order_asked_for(jobs, monkeypatch):
    monkeypatch.setattr(planner.os, "cpu_count", lambda: 1)
    names = ["v6e-8", "v5e-1", "v5p-8", "v6e-1"]
    plans = make_plan("llama-3-8b", names).targets
    assert [plan.target.name for plan in plans] == names
    assert [job.decode_only for job in jobs] == [False, False, False, True, True, True]


def test_a_failure_ends_the_plan(jobs, monkeypatch):
    def fail(self, job):
        raise RuntimeError("compiling failed")

    monkeypatch.setattr(FakeCompilers, "compile", fail)
    with pytest.raises(RuntimeError, match="compiling failed"):
        make_plan("llama-3-8b", ["h200", "v6e-8", "v5p-8"])


def test_the_longer_of_roofline_and_compiler_holds(jobs):
    plan = only(["v6e-1"])
    assert plan.decode is not None
    assert plan.prefill is not None
    # 35 M cycles at 1.75 GHz are 20 ms, and attention comes on top; weights are read in 10.
    assert plan.decode.compiler_s == plan.decode.seconds
    assert plan.decode.seconds > 0.020
    assert plan.decode.source == "compiler"
    assert plan.decode.bound == "HBM"
    # 2,048 tokens of an 8B model: 36 ms at the peak, 40 by the compiler.
    assert plan.prefill.num_tokens == 2048
    assert 0.030 < plan.prefill.roofline_s < 0.040 < plan.prefill.seconds


def test_devices_share_a_model_as_evenly_as_it_can_be_cut(jobs):
    plan = only(["v5e-8"])
    assert (plan.tensor_parallel_size, plan.replicas) == (8, 1)
    assert {job.tensor_parallel_size for job in jobs} == {8}
    assert jobs[0].topology_name == "v5e:2x4"


@pytest.mark.parametrize("target", ["v5p:4x4x4", "v5p-128"])
def test_405b_is_cut_over_64_chips(target, jobs):
    [plan] = make_plan("llama-3.1-405b", [target], max_model_len=8192).targets
    assert (plan.tensor_parallel_size, plan.replicas) == (64, 1)
    assert any("16 hosts" in note for note in plan.notes)
    # 405.85 G weights, and 29.6 G more since each of the 8 KV heads lies on 8 devices.
    share = local_config(read_model("llama-3.1-405b"), 64)
    assert estimate.weight_bytes(share, itemsize=2) == pytest.approx(2 * 435.44e9 / 64, rel=0.001)
    assert {(job.topology_name, job.tensor_parallel_size) for job in jobs} == {("v5p:4x4x4", 64)}


def test_what_a_model_cannot_be_cut_over_serves_copies():
    plan = make_plan("tiny", ["h200-8"]).targets[0]
    assert (plan.tensor_parallel_size, plan.replicas) == (4, 2)
    assert any("2 servers" in note for note in plan.notes)


def test_what_does_not_fit_by_far_is_not_compiled(jobs):
    plan = only(["v5e-1"])
    assert plan.num_blocks == 0
    assert plan.decode is None
    assert plan.why_not.startswith("needs 16.")
    assert "has 14.17 (0.9 of 15.75)" in plan.why_not
    assert plan.why_not.endswith("--target v5e-4 should do")
    assert not jobs


def test_a_sequence_that_is_too_long_is_told_what_would_fit():
    plan = make_plan("llama-3-70b", ["h200-2"], max_model_len=8192).targets[0]
    assert not plan.why_not
    short = make_plan("qwen3-32b", ["a100-80"], max_num_seqs=8, max_num_batched_tokens=512).targets[
        0
    ]
    assert "--max-model-len" in short.why_not
    length = int(short.why_not.partition("--max-model-len ")[2].split()[0])
    fits = make_plan(
        "qwen3-32b", ["a100-80"], max_num_seqs=8, max_num_batched_tokens=512, max_model_len=length
    ).targets[0]
    assert not fits.why_not
    assert fits.num_blocks == length // 16 + 1


def test_what_the_compiler_refuses_does_not_fit(jobs):
    FakeCompilers.error = "RESOURCE_EXHAUSTED: of HBM"
    plan = only(["v6e-8"])
    assert plan.why_not == "the compiler refuses mixed_2048x256: RESOURCE_EXHAUSTED: of HBM"
    assert plan.num_blocks == 0


def test_gpus_need_no_compiler(monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    plan = only(["h200"])
    assert plan.decode is not None
    assert plan.decode.compiler_s is None
    assert plan.decode.source == "roofline"
    assert plan.decode.num_tokens == 256


def test_a_tpu_needs_the_compiler(monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="needs the TPU compiler: pip install libtpu"):
        only(["h200", "v6e-8"])


def test_what_is_not_there_is_said():
    notes = {plan.target.name: plan.notes for plan in make_plan("tiny", ["t4", "h100"]).targets}
    assert notes["h100"] == ()
    assert "attention runs in plain XLA there, far slower than assumed" in notes["t4"]


def test_heads_that_no_tpu_kernel_serves_are_said(jobs):
    [tiny] = make_plan("tiny", ["v6e-1"]).targets
    assert any("no TPU kernel serves head_dim 16" in note for note in tiny.notes)
    assert only(["v6e-1"]).notes == ()


def test_several_hosts_are_said(jobs):
    note = "4 hosts: every one runs the same command, with --nnodes 4"
    assert note in only(["v6e-16"]).notes
    [tiny] = make_plan("tiny", ["v6e-16"]).targets
    assert (
        "4 hosts: one slice runs one server, so these 4 need as many smaller slices" in tiny.notes
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_len": 0}, "context_len must be an integer of at least 1"),
        ({"context_len": 9000}, "context_len must be at most max_model_len=8192, got 9000"),
        ({"max_model_len": 9000}, "max_model_len must be at most the model's 8192"),
        ({"block_size": 7}, "block_size must be one of"),
        ({"dtype": "int4"}, "dtype must be one of"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        only(["h200"], **options)


def test_an_unknown_model_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="unknown model 'llama-9'") as info:
        make_plan("llama-9", ["h200"])
    for name in ("smollm2-135m-instruct", "llama-3-8b", "qwen3-32b", "tiny"):
        assert name in str(info.value)
