"""Checkpoint tensors into the parameter tree: streamed, fused, transposed, cast, and checked.

A source hands out tensors by their Hugging Face names in row chunks; each parameter is assembled
in one host buffer of its final dtype and put on the device before the buffer is dropped, so host
memory never holds two copies of a model. Every name is accounted for, both ways.
"""

import concurrent.futures
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from jpaged.models.causal_lm import CausalLM, Params
from jpaged.models.config import ModelConfig

# Buffers that older checkpoints carry and that are computed here.
_IGNORED = re.compile(r"(\.rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_FLOATS = {"F64", "F32", "F16", "BF16"}
_CHUNK_BYTES = 1 << 22
_ALIGNMENT = 64  # on CPU, device_put takes over a NumPy buffer that is aligned so, without a copy


class TensorSource(Protocol):
    """A checkpoint that tensors can be read from, under Hugging Face names."""

    location: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor."""
        ...

    def describe(self, name: str) -> str:
        """Returns how an error text calls the tensor: its name in the file, and the file."""
        ...

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yields a tensor in chunks of its first axis, each with its first row's index."""
        ...


class SafetensorsSource:
    """The safetensors files of a directory."""

    def __init__(self, directory: Path):
        self.location = str(directory)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in _list_shards(directory):
            try:
                file = safetensors.safe_open(path, framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
            for name in file.keys():  # noqa: SIM118 (not a dict)
                view = file.get_slice(name)
                if view.get_dtype() not in _FLOATS:
                    raise ValueError(
                        f"{path}: tensor {name!r} must be one of {', '.join(sorted(_FLOATS))}, "
                        f"got {view.get_dtype()}"
                    )
                self._shapes[name] = tuple(view.get_shape())
                self._files[name] = (path, file)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor."""
        return self._shapes

    def describe(self, name: str) -> str:
        """Returns how an error text calls the tensor."""
        where = self._files[name][0] if name in self._files else self.location
        return f"{where}: tensor {name!r}"

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yields a tensor in chunks of its first axis, each with its first row's index."""
        view = self._files[name][1].get_slice(name)
        shape = self._shapes[name]
        step = max(1, _CHUNK_BYTES // max(1, 4 * int(np.prod(shape[1:]))))
        for start in range(0, shape[0], step):
            yield start, view[start : min(start + step, shape[0])]


def load_params(model: CausalLM, source: TensorSource) -> Params:
    """Returns the model's parameters, read from the source and placed on the default device.

    Raises:
        ValueError: a tensor is missing, unexpected or of a wrong shape; a file cannot be read.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model.abstract_params)
    plan = [(_checkpoint_names(path, model.config), leaf) for path, leaf in leaves]
    _check_names(plan, source, tied=model.config.tie_word_embeddings)
    # NumPy and the device copy release the interpreter lock; more threads than cores only cost
    # memory.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        params = list(pool.map(lambda entry: _read_param(source, *entry), plan))
    return jax.tree_util.tree_unflatten(treedef, params)


def dummy_params(model: CausalLM) -> Params:
    """Returns random parameters made on the device: the same ones every time."""

    def make(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones(leaf.shape, leaf.dtype)
        return _draw(jax.random.key(next(seeds)), leaf.shape, str(leaf.dtype))

    seeds = itertools.count()
    return jax.tree_util.tree_map_with_path(make, model.abstract_params)


def count_params(model: CausalLM) -> int:
    """Returns how many parameters the model has."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _list_shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is not a readable index of safetensors: {error}") from error
        for name in names:
            if not (directory / name).is_file():
                raise ValueError(f"{index} names {name!r}, which is not there")
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    paths = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{directory} must hold *.safetensors files, got none")
    return paths


def _checkpoint_names(path: tuple[Any, ...], config: ModelConfig) -> list[tuple[str, int | None]]:
    """Returns the tensors that make up a parameter, and the rows of each (None: all)."""
    keys = [str(getattr(entry, "key", getattr(entry, "idx", ""))) for entry in path]
    leaf = "weight" if keys[-1] == "kernel" else keys[-1]
    if keys[0] == "lm_head":
        return [("lm_head.weight", None)]
    prefix = ".".join(["model", *keys[:-2]])
    rows = {
        "q_proj": config.num_heads * config.head_dim,
        "k_proj": config.num_kv_heads * config.head_dim,
        "v_proj": config.num_kv_heads * config.head_dim,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
    }
    parts = _FUSED.get(keys[-2], (keys[-2],))
    return [(f"{prefix}.{part}.{leaf}", rows.get(part)) for part in parts]


def _check_names(plan: list[Any], source: TensorSource, *, tied: bool) -> None:
    shapes = source.shapes()
    wanted: set[str] = set()
    for parts, leaf in plan:
        for name, rows in parts:
            wanted.add(name)
            if name not in shapes:
                raise ValueError(f"{source.describe(name)} is missing")
            # A kernel [in, out] is made of tensors [out, in]; tables and vectors keep their shape.
            shape = leaf.shape
            if len(shape) == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight")):
                shape = shape[::-1]
            shape = (shape[0] if rows is None else rows, *shape[1:])
            if shapes[name] != shape:
                raise ValueError(
                    f"{source.describe(name)} must have shape {shape}, got {shapes[name]}"
                )
    for name in shapes:
        tied_head = tied and name == "lm_head.weight"
        if name not in wanted and not tied_head and not _IGNORED.search(name):
            raise ValueError(f"{source.describe(name)} is unexpected")


def _read_param(
    source: TensorSource, parts: list[tuple[str, int | None]], leaf: jax.ShapeDtypeStruct
) -> jax.Array:
    out = _aligned_empty(leaf.shape, leaf.dtype)
    table = parts[0][0].endswith(("embed_tokens.weight", "lm_head.weight"))
    by_row = out if table or out.ndim == 1 else out.T
    base = 0
    for name, rows in parts:
        try:
            for start, chunk in source.rows(name):
                by_row[base + start : base + start + len(chunk)] = chunk
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{source.describe(name)} cannot be read: {error}") from error
        base += rows or 0
    return jax.device_put(out)


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)
