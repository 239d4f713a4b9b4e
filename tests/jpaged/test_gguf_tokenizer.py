"""Tokenizers rebuilt from GGUF metadata, each against an independent build of the same rules."""

import itertools
import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from jpaged.gguf_tokenizer import backend_from_gguf

TEXTS = [
    "Hello world, it's 12345 o'clock! We'LL see.",
    "a  b\n\n  c\t12 345\r\nçedilla 你好 ",
    "x=1;y+=22  # comment\n\n\n",
]


@pytest.fixture(scope="module")
def byte_level():
    """Metadata of a small byte-level BPE trained on the texts."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = ["<bos>", "<eos>", *sorted(model["vocab"], key=model["vocab"].__getitem__)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
    }


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "it's 123", ["it", "'s", " ", "1", "2", "3"]),
        ("llama-bpe", "it'S 12345\n\nx", ["it", "'S", " ", "123", "45", "\n\n", "x"]),
        ("qwen2", "it'S 12\n\nx", ["it", "'S", " ", "1", "2", "\n\n", "x"]),
    ],
)
def test_texts_are_split_as_llama_cpp_does(pre, text, pieces, byte_level):
    backend = backend_from_gguf(byte_level | {"tokenizer.ggml.pre": pre})
    split = backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in split] == pieces


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2"])
def test_texts_survive_the_round_trip(pre, byte_level):
    fields = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    backend = backend_from_gguf(byte_level | fields)
    for text in TEXTS:
        assert backend.decode(backend.encode(text).ids) == text
    assert backend.encode("<bos>a<eos>").ids[0] == 0


def test_beginning_of_text_is_added_as_the_file_says(byte_level):
    for pre, said, expected in [
        ("llama-bpe", None, True),  # llama.cpp's default for Llama 3
        ("smollm", None, False),
        ("smollm", True, True),
        ("llama-bpe", False, False),
    ]:
        fields = {"tokenizer.ggml.pre": pre}
        if said is not None:
            fields["tokenizer.ggml.add_bos_token"] = said
        backend = backend_from_gguf(byte_level | fields)
        assert (backend.encode("a").ids[0] == 0) is expected
        assert backend.encode("a", add_special_tokens=False).ids[0] != 0


SPM_PIECES = {
    "\u2581": -1.0, "h": -2.0, "e": -2.1, "l": -2.2, "o": -2.3, "w": -2.4, "r": -2.5, "d": -2.6,
    "ll": -0.5, "he": -0.7, "\u2581he": -0.8, "llo": -0.6, "hello": -0.9, "\u2581hello": -0.95,
    "wo": -0.65, "\u2581wo": -0.64, "ld": -0.9, "el": -0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def sentencepiece():
    """Metadata of a small SentencePiece-style BPE: scores, byte pieces, no merges."""
    control = ["<unk>", "<s>", "</s>"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": control + raw + list(SPM_PIECES),
        "tokenizer.ggml.scores": [0.0] * (3 + 256) + list(SPM_PIECES.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(SPM_PIECES),
        "tokenizer.ggml.bos_token_id": 1,
    }


def merge_by_score(text):
    """SentencePiece's BPE from its definition: always the best-scored adjacent pair, leftmost."""
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [
            (-SPM_PIECES[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in SPM_PIECES
        ]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("text", ["hello world", "hello", "wo ld  hell", "ell oll wold he"])
def test_sentencepiece_scores_become_merges(text, sentencepiece):
    backend = backend_from_gguf(sentencepiece)
    encoded = backend.encode(text, add_special_tokens=False)
    assert encoded.tokens == merge_by_score(text)
    assert backend.decode(encoded.ids) == text
    assert backend.encode(text).ids[0] == 1


def test_sentencepiece_falls_back_to_bytes(sentencepiece):
    backend = backend_from_gguf(sentencepiece)
    ids = backend.encode("h好", add_special_tokens=False).ids
    assert backend.decode(ids) == "h好"
    assert [backend.id_to_token(i) for i in ids[-3:]] == ["<0xE5>", "<0xA5>", "<0xBD>"]


def test_unknown_kinds_are_refused_with_the_known_ones(byte_level):
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre must be one of smollm, llama-bpe, q"):
        backend_from_gguf(byte_level | {"tokenizer.ggml.pre": "tekken"})
    with pytest.raises(ValueError, match=r"tokenizer.ggml.model must be gpt2 or llama, got 'bert'"):
        backend_from_gguf({"tokenizer.ggml.model": "bert"})
    with pytest.raises(KeyError, match=r"tokenizer.ggml.tokens"):
        backend_from_gguf({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"})
