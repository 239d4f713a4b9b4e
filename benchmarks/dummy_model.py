"""Models of random weights for benchmarks: a `config.json` and the sizes that a floor needs."""

import argparse
import json
from pathlib import Path

from roofline import ModelShape

from jpaged.plan.shapes import SHAPES


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--config NAME`."""
    parser.add_argument("--config", choices=tuple(SHAPES), default="llama-3-8b")


def write_config(name: str, directory: str) -> str:
    """Writes the `config.json` of a model into a directory and returns its path."""
    path = Path(directory) / "config.json"
    path.write_text(json.dumps(SHAPES[name]))
    return str(path)


def model_shape(name: str) -> ModelShape:
    """The sizes of a model."""
    config = SHAPES[name]
    return ModelShape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
    )
