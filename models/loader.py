"""From the name of a model to its config, its functions and its parameters.

Sources: the embedded default model, a `.gguf` file, a directory (Hugging Face safetensors or our
own Orbax form), a bare `config.json` for random weights, or a hub id where a hub is reachable.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax

from jpaged.models import orbax_io
from jpaged.models.causal_lm import CausalLM, Params
from jpaged.models.config import ModelConfig, as_token_ids
from jpaged.models.gguf import GGUFFile, GGUFSource, read_config
from jpaged.models.sources import read_json, resolve_source
from jpaged.models.weights import SafetensorsSource, dummy_params, load_params

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to run: `model.hidden_states(params, ...)`, `model.logits(params, ...)`.

    Attributes:
        config: the model's shape.
        model: its functions.
        params: its weights, on the default device, or on those of the mesh.
        source: where it came from; `load_tokenizer` takes the same path.
        mesh: the devices that each hold a share, if it is cut.
    """

    config: ModelConfig
    model: CausalLM
    params: Params
    source: Path
    mesh: jax.sharding.Mesh | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model whose weights are still to be read, so that compiling can go on beside that.

    Attributes:
        config: the model's shape.
        model: its functions.
        source: where it is.
        load_params: reads the weights to the default device; slow.
    """

    config: ModelConfig
    model: CausalLM
    source: Path
    load_params: Callable[[], Params]


def load_model(
    source: str | Path | None = None,
    *,
    dtype: str = "auto",
    load_format: str = "auto",
    revision: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> LoadedModel:
    """Returns the model that a source holds, with its weights on the default device.

    Args:
        source: None or "smollm2-135m-instruct" for the embedded default; a directory, a `.gguf`
            file, a `config.json` (with load_format "dummy"), or a hub id such as "org/name".
        dtype: "float32", "bfloat16", "float16", or "auto" to let the device decide.
        load_format: "auto" reads weights; "dummy" makes random ones of the config's shapes.
        revision: branch, tag or commit of a hub id.
        mesh: the devices that each hold a share, from `sharding.make_mesh`.

    Raises:
        ValueError: an argument out of range, an unknown architecture, a broken checkpoint, a model
            that cannot be cut into as many shares.
        RuntimeError: the default model is not installed, or the hub cannot be reached.
    """
    opened = open_model(source, dtype=dtype, load_format=load_format, revision=revision, mesh=mesh)
    return LoadedModel(
        config=opened.config,
        model=opened.model,
        params=opened.load_params(),
        source=opened.source,
        mesh=mesh,
    )


def open_model(
    source: str | Path | None = None,
    *,
    dtype: str = "auto",
    load_format: str = "auto",
    revision: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> OpenedModel:
    """Returns what `load_model` does, but for the weights; arguments and errors are the same."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if load_format not in LOAD_FORMATS:
        formats = ", ".join(LOAD_FORMATS)
        raise ValueError(f"load_format must be one of {formats}, got {load_format!r}")
    path = resolve_source(source, revision=revision)
    read: Callable[..., Params]
    if path.suffix == ".gguf":
        file = GGUFFile(path)
        config = read_config(file)
        read = functools.partial(_read_gguf, file)
    elif orbax_io.is_checkpoint(path):
        config = orbax_io.load_config(path)
        read = functools.partial(orbax_io.load_params, path)
    else:
        config = load_config(path)
        if path.is_file() and load_format != "dummy":
            raise ValueError(f"load_format must be 'dummy' for a bare config, got {path}")
        read = functools.partial(_read_safetensors, path)
    if load_format == "dummy":
        read = dummy_params
    model = CausalLM(
        config,
        dtype=default_dtype() if dtype == "auto" else dtype,
        tensor_parallel_size=1 if mesh is None else mesh.size,
    )
    return OpenedModel(
        config=config,
        model=model,
        source=path,
        load_params=functools.partial(read, model, mesh=mesh),
    )


def load_config(path: Path) -> ModelConfig:
    """Returns the config of a Hugging Face directory, or of a `config.json` itself."""
    config = path if path.is_file() else path / "config.json"
    raw = read_json(config)
    if not raw:
        raise ValueError(f"{config} must be there and hold a JSON object, got none")
    if raw.get("quantization_config"):
        raise ValueError(f"{config}: quantization_config must be absent; use a GGUF for that")
    try:
        parsed = ModelConfig.from_hf(raw)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config}: {error}") from error
    # What ends a chat turn is often only in the generation config (Llama 3).
    ends = as_token_ids(read_json(config.with_name("generation_config.json")).get("eos_token_id"))
    merged = tuple(dict.fromkeys(parsed.eos_token_ids + ends))
    return dataclasses.replace(parsed, eos_token_ids=merged)


def _read_gguf(file: GGUFFile, model: CausalLM, mesh: jax.sharding.Mesh | None) -> Params:
    return load_params(model, GGUFSource(file), mesh)


def _read_safetensors(directory: Path, model: CausalLM, mesh: jax.sharding.Mesh | None) -> Params:
    return load_params(model, SafetensorsSource(directory), mesh)


def default_dtype() -> str:
    """Returns what dtype "auto" means on the default device."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "float32"
    # NVIDIA GPUs before compute capability 8.0 (T4, V100) emulate bfloat16.
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability and float(capability) < 8.0:
        return "float16"
    return "bfloat16"
