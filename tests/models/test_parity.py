"""Logits and greedy ids against transformers: live where torch is installed, golden everywhere."""

import functools
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import needs_default_model, needs_torch
from tiny_models import CASES, PROMPT, paged_logits, write_checkpoint

from jpaged.models import load_model

GOLDEN = Path(__file__).parents[1] / "golden"
# Sums of a few hundred f32 products in another order; measured 2e-5 at most, on logits up to 36.
TINY_TOLERANCE = 1e-4
# The bound; measured 1e-4 on logits up to 38 over 30 layers.
MODEL_TOLERANCE = 2e-3


@functools.cache
def read_golden(name: str):
    return json.loads((GOLDEN / name).read_text("utf-8"))


@functools.cache
def default_model():
    return load_model(dtype="float32")


def padded_logits(token_ids):
    """Logits of the default model; lengths are padded alike so that one compilation serves all."""
    loaded = default_model()
    padded = token_ids + [0] * (128 - len(token_ids))
    logits = paged_logits(loaded.model, loaded.params, padded, block_size=16)
    return logits[: len(token_ids)]


def oracles():
    """The oracle's makers, from the script that makes the golden files."""
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CASES)
def test_tiny_models_repeat_golden_logits_and_greedy_ids(name, tmp_path):
    golden = read_golden("tiny_models.json")["cases"][name]
    loaded = load_model(write_checkpoint(tmp_path, CASES[name]), dtype="float32")
    prompt, output = golden["prompt_token_ids"], golden["output_token_ids"]
    logits = paged_logits(loaded.model, loaded.params, prompt + output[:-1])
    np.testing.assert_allclose(
        logits[len(prompt) - 1], golden["last_logits"], rtol=0, atol=TINY_TOLERANCE
    )
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == output


@needs_torch
@pytest.mark.filterwarnings("default")  # transformers and torch warn as they please
@pytest.mark.parametrize("name", CASES)
def test_tiny_models_equal_transformers(name, tmp_path):
    import torch  # pyright: ignore[reportMissingImports]

    oracle = oracles().tiny_oracle(CASES[name])
    oracle.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = oracle(torch.tensor([PROMPT])).logits[0].numpy()
    # What transformers wrote, its own config.json included, is what we read.
    loaded = load_model(tmp_path, dtype="float32")
    logits = paged_logits(loaded.model, loaded.params, PROMPT)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TINY_TOLERANCE)


@pytest.mark.parametrize("name", ["llama_gqa_llama3", "mistral_window", "qwen3"])
def test_chunks_equal_the_whole_prompt(name, tmp_path):
    loaded = load_model(write_checkpoint(tmp_path, CASES[name]), dtype="float32")
    whole = paged_logits(loaded.model, loaded.params, PROMPT)
    chunks = paged_logits(loaded.model, loaded.params, PROMPT, chunk=16)
    np.testing.assert_allclose(chunks, whole, rtol=0, atol=TINY_TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(dtype, tmp_path):
    checkpoint = write_checkpoint(tmp_path, CASES["qwen3"])
    exact = load_model(checkpoint, dtype="float32")
    loaded = load_model(checkpoint, dtype=dtype)
    logits = paged_logits(loaded.model, loaded.params, PROMPT, dtype=jnp.dtype(dtype))
    expected = paged_logits(exact.model, exact.params, PROMPT)
    assert logits.dtype == np.float32
    # Relative to the spread of logits: 8 (bf16) or 11 (f16) bits through three layers.
    error = np.abs(logits - expected).mean() / expected.std()
    assert error < {"bfloat16": 0.05, "float16": 0.005}[dtype]


@needs_default_model
@pytest.mark.model
def test_default_model_repeats_golden_logits_and_greedy_ids():
    # Two prompts here, teacher-forced; the engine's tests generate all twenty.
    for entry in read_golden("smollm2_greedy.json")["prompts"][:2]:
        prompt, output = entry["prompt_token_ids"], entry["output_token_ids"]
        logits = padded_logits(prompt + output[:-1])
        last = logits[len(prompt) - 1]
        assert np.argsort(-last)[: len(entry["top_token_ids"])].tolist() == entry["top_token_ids"]
        np.testing.assert_allclose(
            last[entry["top_token_ids"]], entry["top_logits"], rtol=0, atol=MODEL_TOLERANCE
        )
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == output


@needs_default_model
@needs_torch
@pytest.mark.model
@pytest.mark.filterwarnings("default")
def test_default_model_equals_transformers():
    import torch  # pyright: ignore[reportMissingImports]

    oracle = oracles().load_default_model()
    for entry in read_golden("smollm2_greedy.json")["prompts"][2:4]:
        ids = entry["prompt_token_ids"]
        with torch.no_grad():
            expected = oracle(torch.tensor([ids])).logits[0].numpy()
        logits = padded_logits(ids)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=MODEL_TOLERANCE)


def test_golden_file_is_complete():
    golden = read_golden("smollm2_greedy.json")
    assert len(golden["prompts"]) == 20
    assert all(len(entry["output_token_ids"]) == 64 for entry in golden["prompts"])
    assert "Apache-2.0" in golden["meta"]["prompts_from"]
    assert set(read_golden("tiny_models.json")["cases"]) == set(CASES)
