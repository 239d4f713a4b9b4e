"""Mistral: Llama with a sliding window in every layer (7B v0.1) or in none (later releases)."""

from collections.abc import Mapping
from typing import Any

from jpaged.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """The Mistral family."""

    @staticmethod
    def read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the config fields that are this family's own, from a ``config.json``."""
        window = raw.get("sliding_window", 4096)  # the family's default when a config is silent
        return {"layer_windows": (window,) * raw["num_hidden_layers"]}
