"""One model over several devices: who holds which heads, columns and rows of the vocabulary.

Tensor parallelism after Megatron-LM: projections into heads and into the MLP are cut by their
outputs, those back to the residual stream by their inputs, so that a layer needs two sums over the
devices; embedding and output projection are cut by the vocabulary. A device runs the very module
of the model, with the counts of its share. Where there are more devices than KV heads, several
hold the same one.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jpaged.models.config import ModelConfig

MODEL_AXIS = "model"

_COLUMNS = ("qkv_proj", "gate_up_proj")
_ROWS = ("o_proj", "down_proj")
_TABLES = ("embed_tokens", "lm_head")


def make_mesh(
    size: int, devices: Sequence[Any] | None = None, *, num_hosts: int = 1
) -> jax.sharding.Mesh:
    """Returns the mesh of a model over `size` devices, the first ones if none are named.

    Args:
        size: How many.
        devices: Of which; all that JAX sees if None.
        num_hosts: Processes that they belong to, each with as many.

    Raises:
        ValueError: There are fewer devices.
    """
    found = list(jax.devices() if devices is None else devices)
    if num_hosts > 1:
        found = _of_each_host(found, size, num_hosts)
    if len(found) < size:
        raise ValueError(
            f"tensor_parallel_size must be at most the {len(found)} devices that JAX sees, "
            f"got {size}"
        )
    return jax.sharding.Mesh(np.array(found[:size]), (MODEL_AXIS,))


def _of_each_host(devices: list[Any], size: int, num_hosts: int) -> list[Any]:
    """Returns the devices of a mesh in which every host has as many, in the given order."""
    counts = collections.Counter(device.process_index for device in devices)
    if len(counts) != num_hosts:
        raise ValueError(
            f"nnodes must be the {len(counts)} hosts whose devices JAX sees, got {num_hosts}"
        )
    share, least = size // num_hosts, min(counts.values())
    if size % num_hosts or share > least:
        raise ValueError(
            f"tensor_parallel_size must be a multiple of nnodes={num_hosts} and at most "
            f"{num_hosts * least}, with {least} devices on a host, got {size}"
        )
    taken: collections.Counter[int] = collections.Counter()
    found = []
    for device in devices:
        taken[device.process_index] += 1
        if taken[device.process_index] <= share:
            found.append(device)
    return found


def local_config(config: ModelConfig, size: int) -> ModelConfig:
    """Returns the config of one device's share of a model.

    Raises:
        ValueError: The model cannot be cut into that many shares.
    """
    if size == 1:
        return config
    heads, kv_heads = config.num_heads, config.num_kv_heads
    fits = size >= 1 and heads % size == 0 and config.intermediate_size % size == 0
    if not fits or (kv_heads % size and size % kv_heads):
        choices = [n for n in range(1, heads + 1) if _can_cut(config, n)]
        raise ValueError(
            f"tensor_parallel_size must be one of {', '.join(map(str, choices))} for {heads} "
            f"query heads, {kv_heads} KV heads and an MLP of {config.intermediate_size}, got {size}"
        )
    return dataclasses.replace(
        config,
        num_heads=heads // size,
        num_kv_heads=max(kv_heads // size, 1),
        intermediate_size=config.intermediate_size // size,
        vocab_size=-(-config.vocab_size // size),
    )


def _can_cut(config: ModelConfig, size: int) -> bool:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    return (
        heads % size == 0
        and config.intermediate_size % size == 0
        and (kv_heads % size == 0 or size % kv_heads == 0)
    )


def param_spec(keys: Sequence[str]) -> PartitionSpec:
    """Returns how a parameter lies over the devices, from its path in the tree."""
    module, leaf = keys[-2:]
    if module in _COLUMNS:
        return PartitionSpec(None, MODEL_AXIS) if leaf == "kernel" else PartitionSpec(MODEL_AXIS)
    if module in _TABLES or (module in _ROWS and leaf == "kernel"):
        return PartitionSpec(MODEL_AXIS, None)
    return PartitionSpec()


def pool_spec() -> PartitionSpec:
    """Returns how a layer's block pool lies over the devices: by KV heads."""
    return PartitionSpec(None, None, MODEL_AXIS)


def part_rows(keys: Sequence[str], config: ModelConfig) -> dict[str, int] | None:
    """Returns the checkpoint's parts of a fused parameter and the outputs of each; None: not one.

    Args:
        keys: The parameter's path in the tree.
        config: The whole model's.
    """
    kv_size = config.num_kv_heads * config.head_dim
    if keys[-2] == "qkv_proj":
        return {"q_proj": config.num_heads * config.head_dim, "k_proj": kv_size, "v_proj": kv_size}
    if keys[-2] == "gate_up_proj":
        return {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
    return None


def placements(
    keys: Sequence[str], config: ModelConfig, size: int
) -> Iterator[tuple[str, int, int, int]]:
    """Yields where the parts of a fused parameter go: part, its rows from and to, and whither.

    Fused outputs lie device by device, each with its share of every part, so that a plain cut
    gives every device its own.
    """
    parts = part_rows(keys, config)
    assert parts is not None, f"{keys} is not fused"
    place = 0
    for device in range(size):
        for name, rows in parts.items():
            is_kv = name in ("k_proj", "v_proj")
            shares = min(size, config.num_kv_heads) if is_kv else size
            share = rows // shares
            start = device * shares // size * share
            yield name, start, start + share, place
            place += share


@dataclasses.dataclass(frozen=True)
class RowShare:
    """Rows that a device works on of those that all have, for use inside a `shard_map`.

    Attributes:
        axis: The mesh axis.
        num_rows: Rows of a device.
    """

    axis: str
    num_rows: int

    def of(self, tree: Any) -> Any:
        """This device's rows of arrays that every device has."""
        first = jax.lax.axis_index(self.axis) * self.num_rows
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, self.num_rows), tree
        )

    def exchanged(self, columns: jax.Array) -> jax.Array:
        """This device's rows of an array of whose columns each device has some."""
        parts = jax.lax.all_to_all(columns, self.axis, split_axis=0, concat_axis=0, tiled=True)
        return _side_by_side(parts, self.num_rows)

    def gathered(self, tree: Any) -> Any:
        """All rows, from what each device has of them."""
        return jax.tree.map(
            lambda leaf: jax.lax.all_gather(leaf, self.axis, axis=0, tiled=True), tree
        )


def gathered_columns(columns: jax.Array, axis: str) -> jax.Array:
    """All columns of an array of which each device of a mesh axis has some."""
    return _side_by_side(jax.lax.all_gather(columns, axis, axis=0, tiled=True), columns.shape[0])


def _side_by_side(parts: jax.Array, num_rows: int) -> jax.Array:
    """Joins parts that lie below one another, of so many rows each, by their columns.

    JAX's exchanges can join by columns as well, but XLA does that by transposing through an array
    that no tile of a TPU fits: more passes over all of it, and seconds more to compile.
    """
    return jnp.concatenate(jnp.split(parts, parts.shape[0] // num_rows), axis=1)
