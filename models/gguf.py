"""GGUF files: metadata, model config, and tensors dequantised chunk by chunk.

Types and dequantisation come from the package `gguf`. The header is walked here: the package's
reader makes a NumPy view of each of a vocabulary's strings, which a start-up would wait for. A file
that is cut short or corrupt is one ValueError that names it.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import gguf.quants
import ml_dtypes
import numpy as np

from jpaged.models.config import ModelConfig
from jpaged.models.rope_scaling import RopeScaling

# llama also covers Mistral; its converters interleave the rows of q and k, the others do not.
FAMILIES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_ALL = slice(None)
_PAIRED = (".self_attn.q_proj.", ".self_attn.k_proj.")
# 1 MiB of quantised bytes at a time keeps NumPy's temporaries in cache and frees the interpreter
# lock, so that threads help.
_CHUNK_BYTES = 1 << 20


class TensorInfo(NamedTuple):
    """Where a tensor lies: shape in NumPy's order, GGML type, absolute offset, bytes."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: the file.
        metadata: key to value; arrays are lists.
        tensors: name to place, under the file's own names.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header()
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise ValueError(f"{path} is not a readable GGUF file: {error}") from error

    def _read_header(self) -> None:
        self._offset = 0
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        self._offset = 4
        version = self._take("I")
        if version not in (2, 3):
            raise ValueError(f"version must be 2 or 3 in little-endian order, got {version}")
        num_tensors, num_keys = self._take("Q"), self._take("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._take_string()
            self.metadata[key] = self._take_value(self._take("I"))
        placed = {}
        for _ in range(num_tensors):
            name = self._take_string()
            dims = [self._take("Q") for _ in range(self._take("I"))]
            placed[name] = (tuple(reversed(dims)), self._take("I"), self._take("Q"))
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment must be at least 1, got {alignment!r}")
        data_start = -(-self._offset // alignment) * alignment
        self.tensors = {
            name: self._place(name, shape, kind, data_start + offset)
            for name, (shape, kind, offset) in placed.items()
        }

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        quantization = gguf.GGMLQuantizationType(kind)
        values, size = gguf.GGML_QUANT_SIZES[quantization]
        if not shape or shape[-1] % values:
            raise ValueError(f"tensor {name!r} of type {quantization.name} has shape {shape}")
        num_values = 1
        for dim in shape:
            num_values *= dim
        num_bytes = num_values // values * size
        if offset + num_bytes > len(self._data):
            raise ValueError(
                f"it is cut short: tensor {name!r} ends at byte {offset + num_bytes}, "
                f"the file has {len(self._data)}"
            )
        return TensorInfo(shape, quantization, offset, num_bytes)

    def _take(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self._data, self._offset)
        self._offset += struct.calcsize("<" + form)
        return value

    def _take_string(self) -> str:
        length = self._take("Q")
        end = self._offset + length
        if end > len(self._data):
            raise ValueError(f"it is cut short inside a string at byte {self._offset}")
        text = str(self._data[self._offset : end], "utf-8")
        self._offset = end
        return text

    def _take_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._take_string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ValueError(f"unknown metadata type {kind} at byte {self._offset}")
            return self._take(_SCALARS[kind])
        kind, count = self._take("I"), self._take("Q")
        if kind == _STRING:
            return [self._take_string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"unknown metadata array type {kind} at byte {self._offset}")
        form = np.dtype("<" + _SCALARS[kind])
        values = np.frombuffer(self._data, form, count, self._offset)
        self._offset += values.nbytes
        return values.tolist()

    def rows(
        self, name: str, multiple: int = 1, rows: slice = _ALL
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields a tensor, or some rows and their neighbours, in chunks of a multiple of rows."""
        shape, kind, offset, num_bytes = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, num_bytes, offset)
        if len(shape) == 1:
            yield 0, self._dequantize(name, raw, kind).reshape(shape)
            return
        raw = raw.reshape(shape[0], -1)
        step = max(1, _CHUNK_BYTES // (raw.shape[1] * multiple)) * multiple
        first, last, _ = rows.indices(shape[0])
        for start in range(first // multiple * multiple, last, step):
            chunk = self._dequantize(name, raw[start : start + step], kind)
            yield start, chunk.reshape(-1, *shape[1:])

    def _dequantize(
        self, name: str, raw: np.ndarray, kind: gguf.GGMLQuantizationType
    ) -> np.ndarray:
        plain = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
        if kind.name in plain:
            return raw.view(plain[kind.name])
        quantization = getattr(gguf.quants, kind.name, None)
        if quantization is None:
            raise ValueError(f"{self.path}: tensor {name!r} has unsupported type {kind.name}")
        quantization.init_grid()
        return quantization.dequantize_rows(raw)


class GGUFSource:
    """A GGUF file as a source of tensors under Hugging Face names."""

    def __init__(self, file: GGUFFile):
        self.location = str(file.path)
        self._file = file
        self._names: dict[str, str] = {}
        for name in file.tensors:
            if name != "rope_freqs.weight":  # read by `read_config`
                self._names[_hf_name(name)] = name
        config = read_config(file)
        self._head_dim = config.head_dim
        self._interleaved = file.metadata["general.architecture"] == "llama"

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor."""
        return {name: self._file.tensors[own].shape for name, own in self._names.items()}

    def describe(self, name: str) -> str:
        """Returns how an error text calls the tensor."""
        own = self._names.get(name) or {_hf_name(n): n for n in _all_names(name)}.get(name, name)
        return f"{self.location}: tensor {own!r}"

    def rows(
        self, name: str, rows: slice = _ALL, columns: slice = _ALL
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields a tensor, or what is wanted of it, in chunks of its first axis."""
        own, size = self._names[name], self._head_dim
        is_paired = self._interleaved and any(part in name for part in _PAIRED)
        for start, chunk in self._file.rows(own, size if is_paired else 1, rows):
            if is_paired:
                rest = chunk.shape[1:]
                pairs = chunk.reshape(-1, size // 2, 2, *rest)
                chunk = pairs.swapaxes(1, 2).reshape(-1, *rest)
            yield start, chunk if columns == _ALL else chunk[:, columns]


def read_config(file: GGUFFile) -> ModelConfig:
    """Returns the model config that a GGUF file's metadata and tensors describe.

    Raises:
        ValueError: an unknown architecture, or metadata that is missing or impossible.
    """
    try:
        return _read_config(file)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.path}: {error}") from error


def _read_config(file: GGUFFile) -> ModelConfig:
    data, tensors = file.metadata, file.tensors
    if (parts := data.get("split.count", 1)) > 1:
        raise ValueError(f"split.count must be 1, got {parts}: merge with llama-gguf-split first")
    arch = data.get("general.architecture")
    if not isinstance(arch, str) or arch not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"GGUF architecture must be one of {known}, got {arch!r}")
    if experts := data.get(f"{arch}.expert_count"):
        raise ValueError(f"{arch}.expert_count must be 0 (dense), got {experts}")

    def required(key: str) -> int:
        value = data.get(f"{arch}.{key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{arch}.{key} must be an integer of at least 1, got {value!r}")
        return value

    if "token_embd.weight" not in tensors:
        raise ValueError("tensor 'token_embd.weight' is missing")
    num_layers, num_heads = required("block_count"), required("attention.head_count")
    head_dim = data.get(f"{arch}.attention.key_length") or required("embedding_length") // num_heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := data.get(f"{arch}.{key}", head_dim)) != head_dim:
            raise ValueError(f"{arch}.{key} must be the head's {head_dim}, got {size}")
    ends = (data.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot"))
    window = data.get(f"{arch}.attention.sliding_window") or None
    return ModelConfig(
        architecture=FAMILIES[arch],
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=required("embedding_length"),
        intermediate_size=required("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=data.get(f"{arch}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=float(data.get(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)),
        rope_theta=float(data.get(f"{arch}.rope.freq_base", 10_000.0)),
        rope_scaling=_read_rope_scaling(file, arch),
        max_position_embeddings=required("context_length"),
        tie_word_embeddings="output.weight" not in tensors,
        layer_windows=(window,) * num_layers,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        bos_token_id=data.get("tokenizer.ggml.bos_token_id"),
    )


def _read_rope_scaling(file: GGUFFile, arch: str) -> RopeScaling | None:
    data = file.metadata
    if "rope_freqs.weight" in file.tensors:
        (_, factors), *_ = file.rows("rope_freqs.weight")
        return RopeScaling(kind="factors", factors=tuple(factors.astype(np.float32).tolist()))
    kind = data.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    return RopeScaling(
        kind=kind,
        factor=float(data.get(f"{arch}.rope.scaling.factor", 1.0)),
        original_max_position_embeddings=data.get(
            f"{arch}.rope.scaling.original_context_length", data.get(f"{arch}.context_length", 0)
        ),
        attention_factor=data.get(f"{arch}.rope.scaling.attn_factor"),
    )


def _hf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    blk, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    stem, _, leaf = part.rpartition(".")
    if blk == "blk" and stem in _NAMES:
        return f"model.layers.{layer}.{_NAMES[stem]}.{leaf}"
    return name


def _all_names(hf_name: str) -> list[str]:
    """Returns every GGUF name that could stand for a tensor, for the text of an error."""
    layer = hf_name.split(".")[2] if hf_name.startswith("model.layers.") else "0"
    leaves = ("weight", "bias")
    return [*_TOP_NAMES, *(f"blk.{layer}.{stem}.{leaf}" for stem in _NAMES for leaf in leaves)]
