"""A GGUF file's tokenizer, rebuilt with the package `tokenizers` from vocabulary and merges.

Pre-tokenizers follow llama.cpp's definitions; one that is not listed here is refused, because a
wrong split silently changes what the model reads.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_REGEX = _LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")
# GGUF's name of a pre-tokenizer -> the expression that splits text before byte-level BPE; None for
# digits one by one and then GPT-2's own expression.
_PRE_TOKENIZERS: dict[str, str | None] = {
    "smollm": None,
    "llama-bpe": _LLAMA3_REGEX,
    "qwen2": _QWEN2_REGEX,
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # GGUF's kinds of token


def backend_from_gguf(data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Returns the tokenizer that GGUF metadata describes, special tokens included.

    Raises:
        ValueError: a kind of tokenizer or pre-tokenizer that is not supported.
        KeyError: metadata that the kind needs is missing.
    """
    kind = data.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level_backend(data)
    elif kind == "llama":
        backend = _sentencepiece_backend(data)
    else:
        raise ValueError(f"tokenizer.ggml.model must be gpt2 or llama, got {kind!r}")
    tokens = data["tokenizer.ggml.tokens"]
    kinds = data.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [
            tokenizers.AddedToken(token, special=special, normalized=False)
            for token, token_kind in zip(tokens, kinds, strict=True)
            if token_kind == wanted
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(found)
    bos = data.get("tokenizer.ggml.bos_token_id")
    # llama.cpp's defaults where a file does not say.
    default_bos = kind == "llama" or data.get("tokenizer.ggml.pre") == "llama-bpe"
    if bos is not None and data.get("tokenizer.ggml.add_bos_token", default_bos):
        first = tokens[bos]
        backend.post_processor = processors.TemplateProcessing(
            single=[first, "$A"], pair=[first, "$A", "$B"], special_tokens=[(first, bos)]
        )
    return backend


def _byte_level_backend(data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    pre = data.get("tokenizer.ggml.pre")
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of {', '.join(_PRE_TOKENIZERS)}, got {pre!r}"
        )
    vocab = {token: index for index, token in enumerate(data["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in data["tokenizer.ggml.merges"]]
    # Llama 3 takes a word that is in the vocabulary whole, merges or not.
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    regex = _PRE_TOKENIZERS[pre]
    space = bool(data.get("tokenizer.ggml.add_space_prefix", False))
    split = (
        pre_tokenizers.Digits(individual_digits=True)
        if regex is None
        else pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=regex is None)]
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_backend(data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    tokens, scores = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.scores"]
    kinds = data["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    words = {t for t, kind in zip(tokens, kinds, strict=True) if kind in (_NORMAL, _USER_DEFINED)}
    # A piece's score ranks every pair that makes it; of equal scores the earlier id goes first.
    merges = [
        (-scores[vocab[word]], vocab[word], word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in words and word[cut:] in words
    ]
    merges.sort()
    unknown = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            [(left, right) for *_, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = bool(data.get("tokenizer.ggml.add_space_prefix", True))
    prefix = [normalizers.Prepend("\u2581")] if space else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
