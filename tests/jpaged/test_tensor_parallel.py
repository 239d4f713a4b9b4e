"""A model cut over several devices answers as on one: logits, sampling, beams, swapping.

The host's processor is four devices in a process of its own, which runs this file again.
"""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpaged import LLM, BeamSearchParams, SamplingParams
from jpaged.compile_plan import StepShape
from jpaged.models import load_model
from jpaged.models.config import ModelConfig
from jpaged.models.orbax_io import save_params
from jpaged.models.sharding import local_config, make_mesh, placements

NUM_DEVICES = 4
here = pytest.mark.skipif(
    jax.device_count() < NUM_DEVICES, reason="needs 4 devices: test_on_four_devices runs it"
)
PROMPTS = [[5, 9, 40, 3, 77], list(range(3, 40)), [8] * 19]
# 97 tokens are no multiple of the devices; 3 KV heads with 6 query heads are cut in three only.
CASES = {
    "llama_mqa_tied": 4,
    "llama_linear_bias": 4,
    "mistral_window": 4,
    "qwen2_window_tied": 4,
    "qwen3": 2,
    "odd_vocabulary": 4,
    "three_kv_heads": 3,
}
RAW = tiny_models.CASES | {
    "odd_vocabulary": tiny_models.CASES["llama_mha"] | {"vocab_size": 97},
    "three_kv_heads": tiny_models.CASES["llama_mha"]
    | {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "intermediate_size": 96,
    },
}


def test_on_four_devices():
    flag = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
    if flag in os.environ.get("XLA_FLAGS", ""):
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    env = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "1 skipped" in done.stdout, "only this test"


def _logits(directory, size):
    loaded = load_model(directory, dtype="float32", mesh=make_mesh(size) if size > 1 else None)
    logits = tiny_models.paged_logits(
        loaded.model, loaded.params, tiny_models.PROMPT, mesh=loaded.mesh
    )
    return loaded, logits


@here
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_one_device(name, tmp_path):
    directory = tiny_models.write_checkpoint(tmp_path / "hf", RAW[name])
    _, want = _logits(directory, 1)
    cut, got = _logits(directory, CASES[name])
    # Sums in another order: of the largest logit, which tied embeddings make six times larger.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
    shares = {
        shard.device for leaf in jax.tree.leaves(cut.params) for shard in leaf.addressable_shards
    }
    assert len(shares) == CASES[name], "every device has a share"


@here
@pytest.mark.parametrize("name", ["odd_vocabulary", "qwen2_window_tied"])
def test_our_own_checkpoint_is_cut_like_any(name, tmp_path):
    directory = tiny_models.write_checkpoint(tmp_path / "hf", RAW[name])
    whole = load_model(directory, dtype="float32")
    save_params(tmp_path / "own", whole.config, whole.params)
    mesh = make_mesh(4)
    want = load_model(directory, dtype="float32", mesh=mesh)
    got = load_model(tmp_path / "own", dtype="float32", mesh=mesh)
    for ours, theirs in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        assert ours.sharding == theirs.sharding
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def answers(tiny_options):
    """Outputs of one device and of two, of the same requests."""
    found = []
    for size in (1, 2):
        with LLM(**tiny_options, tensor_parallel_size=size) as llm:
            params = [
                SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, ignore_eos=True),
                SamplingParams(temperature=1.0, seed=7, max_tokens=12, n=3, ignore_eos=True),
                SamplingParams(
                    temperature=0.8,
                    seed=8,
                    top_p=0.9,
                    max_tokens=12,
                    repetition_penalty=1.3,
                    logit_bias={5: 2.0},
                    prompt_logprobs=2,
                    ignore_eos=True,
                ),
            ]
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            beams = llm.beam_search(PROMPTS[:1], BeamSearchParams(beam_width=2, max_tokens=8))
            found.append((outputs, beams))
    return found


@here
def test_every_kind_of_request_is_answered_the_same(answers):
    (alone, beams_alone), (cut, beams_cut) = answers
    for one, other in zip(alone, cut, strict=True):
        assert [part.token_ids for part in one.outputs] == [
            part.token_ids for part in other.outputs
        ]
    for one, other in zip(alone[0].outputs[0].logprobs, cut[0].outputs[0].logprobs, strict=True):
        assert one.keys() == other.keys()
        for token_id in one:
            assert abs(one[token_id].logprob - other[token_id].logprob) < 1e-4
    assert len(cut[2].prompt_logprobs) == len(PROMPTS[2])
    for one, other in zip(beams_alone[0].sequences, beams_cut[0].sequences, strict=True):
        assert one.tokens == other.tokens


@here
def test_swapped_sequences_go_on_as_if_never(tiny_options):
    options = tiny_options | {"num_blocks": 17, "max_model_len": 96}
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = [[token, *range(3, 30)] for token in range(40, 44)]
    found = []
    for size in (1, 2):
        with LLM(**options, tensor_parallel_size=size, preemption_mode="swap") as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            found.append([output.outputs[0].token_ids for output in outputs])
            stats = llm.stats()
    assert found[0] == found[1]
    assert stats.scheduler.num_swaps > 0


@here
def test_a_device_holds_its_share_of_the_pool_and_it_is_updated_in_place(tiny_options):
    with LLM(**tiny_options, tensor_parallel_size=2) as llm:
        runner = llm.engine.runner
        pool = next(iter(runner.worker.pools))
        assert pool.shape[2] == 2
        assert {shard.data.shape[2] for shard in pool.addressable_shards} == {1}
        analysis = runner.worker.step.lower(StepShape(4, 4, True), 5000).compile().memory_analysis()
        assert analysis is not None
        share = 5000 * runner.worker.kv_spec.block_bytes
        assert analysis.alias_size_in_bytes >= share * runner.worker.num_layers
        assert analysis.alias_size_in_bytes < 2 * share * runner.worker.num_layers
        assert analysis.temp_size_in_bytes < share


@here
def test_dummy_weights_are_cut_too(tiny_options):
    with LLM(**tiny_options, tensor_parallel_size=2, load_format="dummy") as llm:
        params = llm.engine.runner.worker.params
        assert params is not None
        leaf = params["layers"][0]["mlp"]["gate_up_proj"]["kernel"]
        assert isinstance(leaf.sharding, NamedSharding)
        assert leaf.sharding.spec == P(None, "model")


@here
def test_more_devices_than_there_are_are_refused():
    with pytest.raises(ValueError, match="must be at most the 4 devices that JAX sees, got 5"):
        make_mesh(5)


def _devices(*hosts):
    """Devices of hosts, each with a number of its own."""
    return [types.SimpleNamespace(id=i, process_index=host) for i, host in enumerate(hosts)]


@pytest.mark.parametrize(
    ("hosts", "size", "ids"),
    [
        ((0, 0, 1, 1), 4, [0, 1, 2, 3]),
        ((0, 1, 0, 1), 4, [0, 1, 2, 3]),
        ((0, 0, 1, 1), 2, [0, 2]),
        ((0, 0, 1, 1, 1, 0), 4, [0, 1, 2, 3]),
    ],
)
def test_every_host_has_as_many_devices_of_a_mesh(hosts, size, ids, monkeypatch):
    found = []
    monkeypatch.setattr(jax.sharding, "Mesh", lambda devices, names: found.extend(devices))
    make_mesh(size, _devices(*hosts), num_hosts=2)
    assert [device.id for device in found] == ids


@pytest.mark.parametrize(
    ("hosts", "size", "text"),
    [
        ((0, 0, 0), 2, "nnodes must be the 1 hosts whose devices JAX sees, got 2"),
        ((0, 0, 1, 1), 3, "tensor_parallel_size must be a multiple of nnodes=2 and at most 4"),
        ((0, 0, 0, 1), 4, "nnodes=2 and at most 2, with 1 devices on a host, got 4"),
    ],
)
def test_hosts_that_do_not_fit_a_mesh_are_refused(hosts, size, text):
    with pytest.raises(ValueError, match=text):
        make_mesh(size, _devices(*hosts), num_hosts=2)


@pytest.mark.parametrize("size", [3, 5, 8, 0])
def test_a_size_that_does_not_fit_the_model_is_refused(size):
    config = ModelConfig.from_hf(tiny_models.CASES["llama_gqa_llama3"])
    with pytest.raises(ValueError, match=f"must be one of 1, 2, 4 for 4 query.*, got {size}"):
        local_config(config, size)


def test_every_device_has_its_part_of_fused_projections():
    config = ModelConfig.from_hf(tiny_models.CASES["llama_gqa_llama3"])
    places = list(placements(["self_attn", "qkv_proj", "kernel"], config, 4))
    assert places == [
        ("q_proj", 0, 16, 0),
        ("k_proj", 0, 16, 16),
        ("v_proj", 0, 16, 32),
        ("q_proj", 16, 32, 48),
        ("k_proj", 0, 16, 64),
        ("v_proj", 0, 16, 80),
        ("q_proj", 32, 48, 96),
        ("k_proj", 16, 32, 112),
        ("v_proj", 16, 32, 128),
        ("q_proj", 48, 64, 144),
        ("k_proj", 16, 32, 160),
        ("v_proj", 16, 32, 176),
    ]
