"""Our own checkpoint form: the fused parameter tree in Orbax, the config as JSON beside it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from jpaged.models.causal_lm import CausalLM, Params
from jpaged.models.config import ModelConfig
from jpaged.models.rope_scaling import RopeScaling

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


def load_params(path: Path, model: CausalLM) -> Params:
    """Returns a checkpoint's parameters on the default device, in the model's dtype.

    Raises:
        ValueError: the tree or a shape does not fit the config, or a file is broken.
    """
    import orbax.checkpoint as ocp

    # Checked first: Orbax finds a misfit only with half of the arrays on their way.
    wanted, found = _shapes(model.abstract_params), _read_description(path).get("shapes", {})
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{path}: parameter {name} must have shape {wanted.get(name)}, "
                f"got {found.get(name)}"
            )
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.abstract_params,
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(Path(path).absolute() / _PARAMS, target)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable Orbax checkpoint: {reason}") from error


def _read_description(path: Path) -> dict[str, Any]:
    return json.loads((path / _CONFIG).read_text())


def _shapes(tree: Params) -> dict[str, list[int]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(name): list(leaf.shape) for name, leaf in leaves}
