"""The default model in `transformers`, with the very weights that our GGUF reader dequantises."""

from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers

from jpaged.models.gguf import GGUFFile, GGUFSource, read_config
from jpaged.models.sources import resolve_source


def load_default_model() -> Any:
    """A float32 `LlamaForCausalLM` in evaluation mode."""
    file = GGUFFile(resolve_source(None))
    ours = read_config(file)
    config = transformers.LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        max_position_embeddings=ours.max_position_embeddings,
        rms_norm_eps=ours.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        tie_word_embeddings=True,
    )
    source = GGUFSource(file)
    weights = {}
    for name, shape in source.shapes().items():
        rows = [chunk.astype(np.float32) for _, chunk in source.rows(name)]
        weights[name] = torch.from_numpy(np.concatenate(rows).reshape(shape))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(weights)
    return model.eval()
