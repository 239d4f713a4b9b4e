"""Rooflines by hand-computed numbers, and beside what an H200 was measured to take."""

import json
from pathlib import Path

import jax
import pytest

from jpaged.models.causal_lm import CausalLM
from jpaged.models.sharding import local_config
from jpaged.plan import estimate
from jpaged.plan.estimate import Work, decode_work, prefill_work, step_time
from jpaged.plan.models import read_model
from jpaged.plan.targets import Device, parse_target

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
LLAMA = read_model("llama-3-8b")
TINY = read_model("tiny")

# Round numbers: 1 GB/s, 1 GFLOP/s, 1 MB/s between devices, 1 us a hop.
DEVICE = Device(
    platform="tpu",
    memory_bytes=2**30,
    read_bytes_s=1e9,
    matmul_flop_s=1e9,
    attention_flop_s=1e9,
    link_bytes_s=1e6,
    clock_hz=1e9,
    decode_cycles=1.0,
)

# tiny: 2 layers of 64 x (64 + 2 * 32) + 64 x 64 + 3 x 64 x 128 weights, a table of 64 x 512.
LAYER = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128
TABLE = 64 * 512


def seconds(time):
    return {part.name: (pytest.approx(part.seconds), part.bound) for part in time.parts}


def test_a_decode_step_of_one_device():
    found = step_time(TINY, DEVICE, 2, 1, Work(num_tokens=3, num_sampled=3, decode_context=30))
    assert seconds(found) == {
        # 2 x 3 FLOPs a weight take longer than its 2 bytes.
        "layers": (6 * 2 * LAYER / 1e9, "compute"),
        "logits": (6 * TABLE / 1e9, "compute"),
        # 30 tokens of K and V of 2 heads of 16 in 2 layers; a cycle a token and head is less.
        "attention": (30 * 2 * 2 * 2 * 16 * 2 / 1e9, "memory"),
        "sampling": (8 * 3 * 512 / 1e9, "memory"),
    }
    assert found.bound == "compute"
    assert found.seconds == pytest.approx(sum(part.seconds for part in found.parts))


def test_devices_share_the_work_and_exchange_sums():
    work = Work(num_tokens=2, num_sampled=2, decode_context=10)
    found = step_time(TINY, DEVICE, 2, 2, work)
    # Five sums of 64 numbers of two tokens, and the logits of one; two devices take two hops a sum.
    sent = (2 * 5 * 2 * 64 * 2 + 512 * 4) / 2
    assert seconds(found) == {
        "layers": (2 * LAYER / 2 * 2 * 2 / 1e9, "compute"),
        "logits": (TABLE / 2 * 2 * 2 / 1e9, "compute"),
        "attention": (10 * 2 * 2 * 16 * 2 / 1e9, "memory"),
        "sampling": (8 * 512 / 1e9, "memory"),
        "links": (sent / 1e6 + 5 * 2 * 1e-6, "links"),
    }
    assert found.bound == "links"
    assert found.of("attention", "links") == pytest.approx(
        10 * 2 * 2 * 16 * 2 / 1e9 + sent / 1e6 + 1e-5
    )


def test_rows_that_devices_cannot_share_evenly_go_to_all_of_them():
    found = step_time(TINY, DEVICE, 2, 2, Work(num_tokens=3, num_sampled=3, decode_context=30))
    assert seconds(found)["sampling"] == (8 * 3 * 512 / 1e9, "memory")


def test_attention_of_prompts_is_bound_by_flops():
    found = step_time(TINY, DEVICE, 2, 1, prefill_work(8, 8))
    pairs = 8 * 9 / 2
    assert seconds(found)["attention"] == (4 * 2 * 4 * 16 * pairs / 1e9, "compute")


def test_a_gpu_has_a_fixed_cost_a_layer():
    found = step_time(LLAMA, parse_target("h200").device, 2, 1, decode_work(1, 1024))
    assert found.of("fixed") == pytest.approx(32 * estimate.GPU_LAYER_S)


@pytest.mark.parametrize("config", [LLAMA, TINY], ids=["llama-3-8b", "tiny"])
@pytest.mark.parametrize("size", [1, 2])
def test_weights_are_those_of_the_model(config, size):
    model = CausalLM(config, dtype="bfloat16", tensor_parallel_size=size)
    shapes = jax.tree.leaves(model.abstract_params)
    matrices = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes if len(leaf.shape) > 1)
    assert estimate.weight_bytes(local_config(config, size), 2) == matrices // size


def test_a_block_and_the_state():
    # Llama-3-8B: 128 KiB a token.
    assert estimate.block_bytes(LLAMA, 2, 16) == 2 << 20
    assert estimate.block_bytes(local_config(LLAMA, 8), 2, 16) == (2 << 20) // 8
    assert estimate.state_bytes(TINY, 16) == 16 * 512 * 9 + 16 * 512 // 8


@pytest.mark.parametrize("file", ["step_h200.json", "step_many_rows_h200.json"])
def test_steps_of_an_h200_took_little_more_than_predicted(file):
    device = parse_target("h200").device
    for batch in json.loads((RESULTS / file).read_text())["batches"]:
        work = decode_work(batch["batch"], batch["context"])
        predicted_ms = step_time(LLAMA, device, 2, 1, work).seconds * 1e3
        # A bound from below, which docs/plan.md says is at most a fifth too low.
        assert 0.8 < predicted_ms / batch["wall_ms"] <= 1.0


def test_the_pool_of_an_h200_was_as_large_as_predicted():
    measured = json.loads((RESULTS / "throughput_azure_conv_h200.json").read_text())
    num_seqs, num_tokens = measured["max_num_seqs"], measured["max_num_batched_tokens"]
    left = int(parse_target("h200").device.memory_bytes * 0.9)
    left -= estimate.weight_bytes(LLAMA, 2) + estimate.state_bytes(LLAMA, num_seqs)
    left -= estimate.gpu_temp_bytes(LLAMA, LLAMA.vocab_size, 2, num_tokens, num_seqs)
    blocks = left // estimate.block_bytes(LLAMA, 2, 16)
    assert blocks == pytest.approx(measured["num_blocks"], rel=0.01)
