"""Whole steps compiled for real TPUs on this host, where `libtpu` is installed."""

import importlib.util
import json

import pytest

from benchmarks.tpu_steps import cases, compile_case, is_in_place
from jpaged.compile_plan import StepShape
from jpaged.engine_config import EngineConfig
from jpaged.models.config import ModelConfig
from jpaged.plan.compile_target import Compiled
from jpaged.plan.compiler import compile_job
from jpaged.plan.models import read_model
from jpaged.plan.planner import step_job
from jpaged.plan.targets import parse_target

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install libtpu",
)
DECODE, CHUNKS = "jpaged_attention_decode", "jpaged_attention_chunks"
WRITE, COPY, ROPE = "jpaged_write_kv", "jpaged_copy_blocks", "jpaged_rope"
# Weights alone are more than the memory.
TOO_LARGE = {("llama-3-8b", "v5e-1"), ("llama-3-70b", "v5e-8")}
# SmolLM2-135M but for its depth and vocabulary.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "vocab_size": 1024,
}
HEADS_OF_128 = SMOLLM2 | {
    "hidden_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
DECODES, CHUNK = StepShape(16, 16, True, plain=True), StepShape(256, 16, False)


def _kernels(name: str, config: ModelConfig) -> dict[str, int]:
    """What must run in a step: every layer's attention, write and, if asked for, copy."""
    kernels = [DECODE, WRITE]
    kernels += [ROPE] if config.head_dim == 128 else []
    kernels += [CHUNKS] if name.startswith("mixed") else []
    kernels += [] if name.endswith("plain") else [COPY]
    return dict.fromkeys(kernels, config.num_layers)


@pytest.mark.parametrize(
    ("raw", "shape"),
    [
        pytest.param(SMOLLM2, DECODES, id="smollm2_decode"),
        pytest.param(SMOLLM2, CHUNK, id="smollm2_mixed"),
        pytest.param(HEADS_OF_128, CHUNK, id="heads_of_128_mixed"),
    ],
)
def test_steps_run_the_kernels_in_place(raw, shape, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    options = EngineConfig.from_options(model=str(tmp_path), max_num_seqs=16)
    target, config = parse_target("v6e-1"), read_model(str(tmp_path))
    compiled = compile_job(step_job(options, config, target, 1, shape, num_blocks=4096))
    assert not compiled.error
    assert compiled.kernels == _kernels(shape.name, config)
    assert compiled.collectives == {}
    assert is_in_place(compiled)
    assert compiled.temp_bytes < 64 << 20


@pytest.mark.nightly
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case.model}-{case.target}")
def test_whole_models_compile(case):
    results = list(compile_case(case))
    assert len(results) == len(case.shapes)
    for result in results:
        compiled = Compiled(**result["compiled"])
        if (case.model, case.target) in TOO_LARGE:
            assert compiled.error.startswith("RESOURCE_EXHAUSTED")
            continue
        assert not compiled.error
        assert compiled.kernels == _kernels(result["step"], read_model(case.model))
        assert ("all-reduce" in compiled.collectives) == (result["num_devices"] > 1)
        assert is_in_place(compiled)
