"""Checkpoint tensors into the parameter tree: streamed, fused, transposed, cast, and checked.

A source hands out tensors by their Hugging Face names in row chunks; each parameter is assembled
in one host buffer of its final dtype and put on the device before the buffer is dropped, so host
memory never holds two copies of a model. Every name is accounted for, both ways.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from jpaged.models import sharding
from jpaged.models.causal_lm import CausalLM, Params, path_keys
from jpaged.models.config import ModelConfig

# Buffers that older checkpoints carry and that are computed here.
_IGNORED = re.compile(r"(\.rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")
_TABLES = ("embed_tokens.weight", "lm_head.weight")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_CHUNK_BYTES = 1 << 22
ALL = slice(None)
_ALIGNMENT = 64  # on CPU, device_put takes over a NumPy buffer that is aligned so, without a copy


Box = tuple[tuple[int, int, int], ...]
"""Part of an array: first index, the one past the last, and the array's size, for each axis."""


class TensorSource(Protocol):
    """A checkpoint that tensors can be read from, under Hugging Face names."""

    location: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor."""
        ...

    def describe(self, name: str) -> str:
        """Returns how an error text calls the tensor: its name in the file, and the file."""
        ...

    def rows(
        self, name: str, rows: slice = ALL, columns: slice = ALL
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields a tensor in chunks of its first axis, each with its first row's index.

        Args:
            name: of the tensor.
            rows: those that are wanted; others may come with them.
            columns: those that are wanted, and that come; of a tensor with two axes.
        """
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

    def rows(
        self, name: str, rows: slice = ALL, columns: slice = ALL
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields a tensor, or what is wanted of it, in chunks of its first axis."""
        view = self._files[name][1].get_slice(name)
        shape = self._shapes[name]
        step = max(1, _CHUNK_BYTES // max(1, 4 * int(np.prod(shape[1:]))))
        first, last, _ = rows.indices(shape[0])
        for start in range(first, last, step):
            chunk = slice(start, min(start + step, last))
            # Of a cut across the columns only its own bytes are read.
            yield start, view[chunk] if columns == ALL else view[chunk, columns]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Rows `start:stop` of a checkpoint's tensor, and their first row in a parameter."""

    name: str
    start: int
    stop: int
    place: int


def load_params(
    model: CausalLM, source: TensorSource, mesh: jax.sharding.Mesh | None = None
) -> Params:
    """Returns the model's parameters, read from the source and placed on the devices.

    Args:
        model: The model.
        source: Its checkpoint.
        mesh: The devices of a model that is cut; None: the default device.

    Raises:
        ValueError: a tensor is missing, unexpected or of a wrong shape; a file cannot be read.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model.abstract_params)
    paths = [path_keys(path) for path, _ in leaves]
    pieces = [_pieces(keys, model) for keys in paths]
    _check_names(paths, pieces, source, model)
    specs = jax.tree.leaves(model.param_specs)

    def read(index: int) -> jax.Array:
        leaf = leaves[index][1]
        box = _box(leaf.shape, specs[index], mesh)
        return place(_read_param(source, pieces[index], leaf, box), specs[index], mesh, box)

    # NumPy and the device copy release the interpreter lock; more threads than cores only cost
    # memory.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        params = list(pool.map(read, range(len(leaves))))
    return jax.tree_util.tree_unflatten(treedef, params)


def place(
    array: np.ndarray,
    spec: jax.sharding.PartitionSpec,
    mesh: jax.sharding.Mesh | None,
    box: Box | None = None,
) -> jax.Array:
    """Returns a parameter on the devices, each with its share, or on the default one.

    Args:
        array: The parameter, or what `box` says of it.
        spec: How it is cut.
        mesh: The devices.
        box: Where the array lies in the parameter; the whole of it if None.
    """
    if mesh is None:
        return jax.device_put(array)
    box = box or tuple((0, size, size) for size in array.shape)
    placed = jax.sharding.NamedSharding(mesh, spec)

    def share(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [cut.indices(size) for cut, (_, _, size) in zip(index, box, strict=True)]
        places = zip(bounds, box, strict=True)
        return array[
            tuple(slice(start - first, stop - first) for (start, stop, _), (first, _, _) in places)
        ]

    return jax.make_array_from_callback(tuple(size for _, _, size in box), placed, share)


def _box(
    shape: Sequence[int], spec: jax.sharding.PartitionSpec, mesh: jax.sharding.Mesh | None
) -> Box:
    """Returns the least part of a parameter that holds the shares of this host's devices."""
    if mesh is None:
        return tuple((0, size, size) for size in shape)
    placed = jax.sharding.NamedSharding(mesh, spec)
    shares = list(placed.addressable_devices_indices_map(tuple(shape)).values())
    box = []
    for axis, size in enumerate(shape):
        bounds = [share[axis].indices(size) for share in shares if share is not None]
        box.append((min(start for start, _, _ in bounds), max(s for _, s, _ in bounds), size))
    return tuple(box)


def dummy_params(model: CausalLM, mesh: jax.sharding.Mesh | None = None) -> Params:
    """Returns random parameters made on the devices: the same ones every time."""

    def make(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, spec: Any) -> jax.Array:
        placed = None if mesh is None else jax.sharding.NamedSharding(mesh, spec)
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones(leaf.shape, leaf.dtype, device=placed)
        return _draw(jax.random.key(next(seeds)), leaf.shape, str(leaf.dtype), placed)

    seeds = itertools.count()
    return jax.tree_util.tree_map_with_path(make, model.abstract_params, model.param_specs)


def count_params(model: CausalLM) -> int:
    """Returns how many parameters the model has."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(
    key: jax.Array, shape: tuple[int, ...], dtype: str, placed: jax.sharding.Sharding | None
) -> jax.Array:
    drawn = (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return drawn if placed is None else jax.lax.with_sharding_constraint(drawn, placed)


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


def _pieces(keys: list[str], model: CausalLM) -> list[_Piece]:
    """Returns where the rows of a parameter's outputs come from."""
    leaf = "weight" if keys[-1] == "kernel" else keys[-1]
    prefix = [] if keys[0] == "lm_head" else ["model"]
    config = model.config
    if sharding.part_rows(keys, config) is None:
        name = ".".join([*prefix, *keys[:-1], leaf])
        return [_Piece(name, 0, _num_outputs(keys, config), 0)]
    module = ".".join([*prefix, *keys[:-2]])
    return [
        _Piece(f"{module}.{part}.{leaf}", start, stop, place)
        for part, start, stop, place in sharding.placements(
            keys, config, model.tensor_parallel_size
        )
    ]


def _num_outputs(keys: list[str], config: ModelConfig) -> int:
    """Returns the rows of a tensor that is a parameter of its own."""
    if is_table(keys):
        return config.vocab_size
    return config.head_dim if keys[-2] in ("q_norm", "k_norm") else config.hidden_size


def is_table(keys: Sequence[str]) -> bool:
    """Returns whether a parameter is stored as in the checkpoint: a row a token."""
    return keys[0] in ("embed_tokens", "lm_head")


def _check_names(
    paths: list[list[str]], pieces: list[list[_Piece]], source: TensorSource, model: CausalLM
) -> None:
    shapes = source.shapes()
    leaves = jax.tree.leaves(model.abstract_params)
    tied = model.config.tie_word_embeddings
    wanted: set[str] = set()
    for keys, parts, leaf in zip(paths, pieces, leaves, strict=True):
        for name in dict.fromkeys(piece.name for piece in parts):
            wanted.add(name)
            if name not in shapes:
                raise ValueError(f"{source.describe(name)} is missing")
            rows = max(piece.stop for piece in parts if piece.name == name)
            # A kernel [in, out] is made of tensors [out, in]; tables and vectors keep their shape.
            shape = (rows,) if len(leaf.shape) == 1 else (rows, leaf.shape[int(is_table(keys))])
            if shapes[name] != shape:
                raise ValueError(
                    f"{source.describe(name)} must have shape {shape}, got {shapes[name]}"
                )
    for name in shapes:
        tied_head = tied and name == "lm_head.weight"
        if name not in wanted and not tied_head and not _IGNORED.search(name):
            raise ValueError(f"{source.describe(name)} is unexpected")


def _read_param(
    source: TensorSource, pieces: list[_Piece], leaf: jax.ShapeDtypeStruct, box: Box
) -> np.ndarray:
    """Returns what a box holds of a parameter."""
    out = _aligned_empty([last - first for first, last, _ in box], leaf.dtype)
    is_by_row = pieces[0].name.endswith(_TABLES) or out.ndim == 1
    by_row = out if is_by_row else out.T
    (top, bottom, _), *across = box if is_by_row else reversed(box)
    is_cut_across = any((first, last) != (0, size) for first, last, size in across)
    columns = slice(*across[0][:2]) if is_cut_across else ALL
    # Rows that the checkpoint does not have make the vocabulary a multiple of the devices.
    end = max(piece.place + piece.stop - piece.start for piece in pieces)
    by_row[max(end - top, 0) :] = 0
    wanted: dict[str, list[_Piece]] = {}
    for piece in pieces:
        first = piece.start + max(top - piece.place, 0)
        last = min(piece.stop, piece.start + bottom - piece.place)
        if first < last:
            place = piece.place + first - piece.start - top
            wanted.setdefault(piece.name, []).append(_Piece(piece.name, first, last, place))
    for name, parts in wanted.items():
        rows = slice(min(part.start for part in parts), max(part.stop for part in parts))
        try:
            for start, chunk in source.rows(name, rows, columns):
                for part in parts:
                    first = max(start, part.start)
                    last = min(start + len(chunk), part.stop)
                    if first < last:
                        target = part.place - part.start
                        by_row[target + first : target + last] = chunk[first - start : last - start]
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{source.describe(name)} cannot be read: {error}") from error
    return out


def _aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)
