"""Configs: what real checkpoints say, in both spellings, and what is refused."""

import dataclasses

import pytest
from tiny_models import CASES

from jpaged.models import CausalLM, ModelConfig, RopeScaling
from jpaged.models.registry import ARCHITECTURES, resolve_architecture
from jpaged.models.weights import count_params

LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
}
REAL = {
    "Llama-2-7B": (
        LLAMA_3 | {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32},
        6_738_415_616,
    ),
    "Llama-3-8B": (LLAMA_3, 8_030_261_248),
    "Llama-3-70B": (
        LLAMA_3
        | {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
        70_553_706_496,
    ),
    "Mistral-7B-v0.1": (
        LLAMA_3
        | {"architectures": ["MistralForCausalLM"], "vocab_size": 32000, "sliding_window": 4096},
        7_241_732_096,
    ),
    "Qwen2-7B": (
        LLAMA_3
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        7_615_616_512,
    ),
    "Qwen3-8B": (
        LLAMA_3
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": 151936,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "head_dim": 128,
        },
        8_190_735_360,
    ),
}
TINY = CASES["llama_mha"]


@pytest.mark.parametrize("name", REAL)
def test_real_configs_have_the_published_number_of_parameters(name):
    raw, published = REAL[name]
    assert count_params(CausalLM(ModelConfig.from_hf(raw), dtype="bfloat16")) == published


def test_equal_layers_share_one_trace():
    from flax import nnx

    model = CausalLM(ModelConfig.from_hf(CASES["qwen2_window_tied"]))
    whole = nnx.merge(model._graphdef, _state(model))
    graphdefs = [nnx.split(layer)[0] for layer in whole.layers]
    assert graphdefs[1] == graphdefs[2]
    assert hash(graphdefs[1]) == hash(graphdefs[2])
    assert graphdefs[0] != graphdefs[1]  # only the upper layers have a window


def _state(model):
    import jax

    return jax.tree.unflatten(model._treedef, jax.tree.leaves(model.abstract_params))


def test_both_spellings_of_rope_parameters_agree():
    scaling = {"rope_type": "linear", "factor": 2.0}
    older = {**TINY, "rope_theta": 1e5, "rope_scaling": scaling}
    newer = {k: v for k, v in TINY.items() if k != "rope_theta"}
    newer["rope_parameters"] = {**scaling, "rope_theta": 1e5}
    assert ModelConfig.from_hf(older) == ModelConfig.from_hf(newer)
    oldest = {**TINY, "rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert ModelConfig.from_hf(oldest) == ModelConfig.from_hf(newer)


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        # As Qwen2.5's and Qwen3's model cards have users write it: the length stays unscaled.
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"type": "linear", "factor": 4.0}, 512),  # Vicuna 16k
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}, 128),
        (None, 128),
    ],
)
def test_longest_sequence_follows_the_rope_scaling(scaling, length):
    config = ModelConfig.from_hf({**TINY, "rope_scaling": scaling})
    assert config.max_position_embeddings == length


def test_windows_of_each_family():
    mistral = ModelConfig.from_hf(CASES["mistral_window"])
    assert mistral.layer_windows == (9, 9, 9)
    assert mistral.sliding_window == 9
    mixed = ModelConfig.from_hf(CASES["qwen2_window_tied"])
    assert mixed.layer_windows == (None, 7, 7)
    assert mixed.sliding_window is None
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    typed = ModelConfig.from_hf({**CASES["qwen2_window_tied"], "layer_types": types})
    assert typed.layer_windows == (7, None, 7)
    off = ModelConfig.from_hf({**CASES["qwen2_window_tied"], "use_sliding_window": False})
    assert off.layer_windows == (None, None, None)
    silent = {**CASES["qwen2"], "use_sliding_window": True, "num_hidden_layers": 29}
    assert ModelConfig.from_hf(silent).layer_windows == (*(None,) * 28, 4096)


def test_several_end_tokens_are_kept():
    assert ModelConfig.from_hf({**TINY, "eos_token_id": [2, 5]}).eos_token_ids == (2, 5)
    assert ModelConfig.from_hf({**TINY, "eos_token_id": None}).eos_token_ids == ()


def test_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"must be one of Llama.*Qwen3ForCausalLM, got GPT2LMHead"):
        ModelConfig.from_hf({**TINY, "architectures": ["GPT2LMHead"]})
    with pytest.raises(ValueError, match="got none"):
        resolve_architecture([])
    assert resolve_architecture(["X", "LlamaForCausalLM"]) is ARCHITECTURES["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"hidden_size": None}, "hidden_size must be an integer of at least 1, got None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, got 0"),
        ({"vocab_size": True}, "vocab_size must be an integer of at least 1, got True"),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"max_position_embeddings": -1}, "max_position_embeddings must be an integer of at least"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "default, linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor must be positive"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor must be given for rope_type 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "the same for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
    ],
)
def test_bad_fields_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        ModelConfig.from_hf({**TINY, **fields})


def test_bad_windows_and_scalings_are_refused():
    with pytest.raises(ValueError, match=r"sliding_window must be at least 1, got 0"):
        ModelConfig.from_hf({**CASES["mistral_window"], "sliding_window": 0})
    with pytest.raises(ValueError, match="layer_types must hold only"):
        ModelConfig.from_hf({**CASES["qwen2"], "layer_types": ["chunked_attention"] * 3})
    with pytest.raises(ValueError, match="layer_windows must have one entry a layer"):
        dataclasses.replace(ModelConfig.from_hf(TINY), layer_windows=(None,))
    with pytest.raises(ValueError, match="rope_type must be one of default"):
        RopeScaling(kind="su")
    with pytest.raises(ValueError, match="original_max_position_embeddings must be at least 1"):
        RopeScaling(kind="yarn", factor=2.0)
