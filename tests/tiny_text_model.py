"""A tiny random model with a tokenizer, and options of an engine that compiles little."""

import string
from pathlib import Path
from typing import Any

import tiny_models
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

_byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _vocabulary() -> list[str]:
    """Special tokens, characters, single bytes of longer characters, and some words."""
    spell = _byte_level.pre_tokenize_str
    pieces = [*string.ascii_letters, *string.digits, *" .,!?"]
    pieces += ["th", "he", "in", "er", "an", " a", " t", "ing", "the", "qu"]
    spelled = [spell(piece)[0][0] for piece in pieces]
    for character in "🙂é€ß":
        spelled += list(spell(character)[0][0])
    vocabulary = list(dict.fromkeys(["<unk>", "<s>", "</s>", *spelled]))
    size = tiny_models.CASES["llama_gqa_llama3"]["vocab_size"]
    return vocabulary + [f"<extra{i}>" for i in range(size - len(vocabulary))]


def write_model(directory: Path, **others: Any) -> str:
    """Writes the checkpoint, with other fields of its config, and returns its folder."""
    tiny_models.write_checkpoint(directory, tiny_models.CASES["llama_gqa_llama3"] | others)
    vocabulary = {piece: i for i, piece in enumerate(_vocabulary())}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], fuse_unk=False))
    backend.pre_tokenizer = _byte_level
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))
    return str(directory)


def options(model: str, **others: Any) -> dict[str, Any]:
    """Options of an engine that compiles only what it needs."""
    return {
        "model": model,
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "block_size": 8,
        "num_blocks": 80,
        "compilation": "lazy",
    } | others
