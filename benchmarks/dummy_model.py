"""Models of random weights for benchmarks: a `config.json` and the sizes that a floor needs."""

import argparse
import json
from pathlib import Path
from typing import Any

from roofline import ModelShape

_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 8192,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--config NAME`."""
    parser.add_argument("--config", choices=tuple(CONFIGS), default="llama-3-8b")


def write_config(name: str, directory: str) -> str:
    """Writes the `config.json` of a model into a directory and returns its path."""
    path = Path(directory) / "config.json"
    path.write_text(json.dumps(_COMMON | CONFIGS[name]))
    return str(path)


def model_shape(name: str) -> ModelShape:
    """The sizes of a model."""
    config = CONFIGS[name]
    return ModelShape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
    )
