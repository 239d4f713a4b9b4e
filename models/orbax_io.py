"""Our own checkpoint form: the fused parameter tree in Orbax, the config as JSON beside it."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jpaged.models import sharding
from jpaged.models.causal_lm import CausalLM, Params, path_keys
from jpaged.models.config import ModelConfig
from jpaged.models.rope_scaling import RopeScaling
from jpaged.models.weights import is_table, place

_CONFIG, _PARAMS = "jpaged_config.json", "params"


def is_checkpoint(path: Path) -> bool:
    """Returns whether a directory holds a checkpoint of this form."""
    return (path / _CONFIG).is_file()


def save_params(path: Path, config: ModelConfig, params: Params) -> None:
    """Writes a model to a directory that is empty or not there yet."""
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    path.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / _PARAMS, params)
    description = {"config": dataclasses.asdict(config), "shapes": _shapes(params)}
    (path / _CONFIG).write_text(json.dumps(description, indent=1) + "\n")


def load_config(path: Path) -> ModelConfig:
    """Returns the config of a checkpoint.

    Raises:
        ValueError: the file is not one that `save_params` wrote.
    """
    try:
        raw = _read_description(path)["config"]
        if raw["rope_scaling"]:
            factors = tuple(raw["rope_scaling"]["factors"])
            raw["rope_scaling"] = RopeScaling(**raw["rope_scaling"] | {"factors": factors})
        for name in ("layer_windows", "eos_token_ids"):
            raw[name] = tuple(raw[name])
        return ModelConfig(**raw)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / _CONFIG} is not a readable jpaged config: {error}") from error


def load_params(path: Path, model: CausalLM, mesh: jax.sharding.Mesh | None = None) -> Params:
    """Returns a checkpoint's parameters in the model's dtype.

    Args:
        path: The checkpoint's directory.
        model: The model.
        mesh: The devices of a model that is cut; None: the default device.

    Raises:
        ValueError: the tree or a shape does not fit the config, or a file is broken.
    """
    import orbax.checkpoint as ocp

    # Checked first: Orbax finds a misfit only with half of the arrays on their way.
    whole = CausalLM(model.config, dtype=model.dtype).abstract_params
    wanted, found = _shapes(whole), _read_description(path).get("shapes", {})
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{path}: parameter {name} must have shape {wanted.get(name)}, "
                f"got {found.get(name)}"
            )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def wanted_as(leaf: jax.ShapeDtypeStruct) -> Any:
        if mesh is not None:
            return np.empty(leaf.shape, leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(
                Path(path).absolute() / _PARAMS, jax.tree.map(wanted_as, whole)
            )
        return params if mesh is None else _cut(params, model, mesh)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable Orbax checkpoint: {reason}") from error


def _cut(params: Params, model: CausalLM, mesh: jax.sharding.Mesh) -> Params:
    """Returns whole parameters of the host on the devices, each with its share."""

    def cut(path: tuple[Any, ...], whole: np.ndarray, spec: Any, target: Any) -> jax.Array:
        keys = path_keys(path)
        parts = sharding.part_rows(keys, model.config)
        columns = whole if parts is None else np.empty(target.shape, whole.dtype)
        if parts is not None:
            starts = dict(zip(parts, itertools.accumulate(parts.values(), initial=0), strict=False))
            for name, first, last, place_at in sharding.placements(
                keys, model.config, model.tensor_parallel_size
            ):
                found = whole[..., starts[name] + first : starts[name] + last]
                columns[..., place_at : place_at + last - first] = found
        elif is_table(keys):
            columns = np.zeros(target.shape, whole.dtype)
            columns[: len(whole)] = whole
        return place(columns, spec, mesh)

    return jax.tree_util.tree_map_with_path(cut, params, model.param_specs, model.abstract_params)


def _read_description(path: Path) -> dict[str, Any]:
    return json.loads((path / _CONFIG).read_text())


def _shapes(tree: Params) -> dict[str, list[int]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(name): list(leaf.shape) for name, leaf in leaves}
