"""Model definitions in Flax NNX, their registry, and checkpoint loading. Knows no requests."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jpaged.models.attention import AttentionMetadata as AttentionMetadata
    from jpaged.models.causal_lm import CausalLM as CausalLM
    from jpaged.models.causal_lm import Params as Params
    from jpaged.models.config import ModelConfig as ModelConfig
    from jpaged.models.loader import LoadedModel as LoadedModel
    from jpaged.models.loader import OpenedModel as OpenedModel
    from jpaged.models.loader import load_model as load_model
    from jpaged.models.loader import open_model as open_model
    from jpaged.models.registry import ARCHITECTURES as ARCHITECTURES
    from jpaged.models.rope_scaling import RopeScaling as RopeScaling
    from jpaged.models.sources import DEFAULT_MODEL as DEFAULT_MODEL

# Name to module: who needs a tokenizer or a config only must not import JAX with it.
_EXPORTS = {
    "ARCHITECTURES": "registry",
    "DEFAULT_MODEL": "sources",
    "AttentionMetadata": "attention",
    "CausalLM": "causal_lm",
    "LoadedModel": "loader",
    "ModelConfig": "config",
    "OpenedModel": "loader",
    "Params": "causal_lm",
    "RopeScaling": "rope_scaling",
    "load_model": "loader",
    "open_model": "loader",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'jpaged.models' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"jpaged.models.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
