"""Qwen3 dense: Llama with a norm on every query and key head, and a head width of its own."""

from collections.abc import Mapping
from typing import Any

from jpaged.models.config import read_layer_windows
from jpaged.models.llama import LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    """The Qwen3 family, dense."""

    @staticmethod
    def read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the config fields that are this family's own, from a ``config.json``."""
        bias = bool(raw.get("attention_bias", False))
        return {
            "head_dim": raw.get("head_dim") or 128,  # the family's default when a config is silent
            "qk_norm": True,
            "qkv_bias": bias,
            "o_bias": bias,
            "layer_windows": read_layer_windows(raw),
        }
