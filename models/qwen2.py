"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and windows in the upper layers if asked."""

from collections.abc import Mapping
from typing import Any

from jpaged.models.config import read_layer_windows
from jpaged.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """The Qwen2 family, dense."""

    @staticmethod
    def read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the config fields that are this family's own, from a ``config.json``."""
        return {"qkv_bias": True, "layer_windows": read_layer_windows(raw)}
