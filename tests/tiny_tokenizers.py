"""Tokenizers of a few hundred tokens, byte-level and SentencePiece-like, and models for them."""

import json
from pathlib import Path
from typing import Any

import tiny_models
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

BOS, EOS, END_OF_TURN = 1, 2, 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>", "<|tag|>"]
VOCAB_SIZE = 320
"""Of the models; more than any of the tokenizers has."""

# Pairs that JSON brings together, and some that cut across its structure.
_MERGES = [
    ("{", '"'), ('"', ":"), ('"', ","), ('",', '"'), ('"', "}"), ("}", "}"), ("[", '"'), ("]", "}"),
    ("t", "r"), ("tr", "u"), ("tru", "e"), ("1", "2"), ("12", "3"), ("a", "b"), (":", '"'),
]  # fmt: skip


def byte_level() -> tokenizers.Tokenizer:
    """One token for each byte, and some for pairs, as GPT-2's kind has them."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [left + right for left, right in _MERGES]
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, _MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    """ASCII characters with spaces as U+2581, and tokens for bytes, as Llama 2 has them."""
    characters = ["\u2581", *(chr(code) for code in range(0x21, 0x7F) if chr(code) not in "<>")]
    merges = [(left, right) for left, right in _MERGES if left in characters and len(right) == 1]
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters[:40]]
    words += [word for word in ('{"', '":', "\u2581a") if word not in words]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [pair for pair in merges if {*pair, "".join(pair)} <= vocab.keys()]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(SPECIAL)
    return backend


def write_model(directory: Path, backend: tokenizers.Tokenizer, **fields: Any) -> str:
    """Writes a tiny Llama with random weights and a tokenizer; returns its path."""
    raw = tiny_models.CASES["llama_gqa_llama3"] | {
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": 1,
        "max_position_embeddings": 512,
        "eos_token_id": [EOS, END_OF_TURN],
    }
    tiny_models.write_checkpoint(directory, raw | fields)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )
    return str(directory)
