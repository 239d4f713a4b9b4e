"""From what `--model` says to the shape of a model; its weights are neither read nor fetched."""

from pathlib import Path

from jpaged.models import orbax_io
from jpaged.models.config import ModelConfig
from jpaged.models.gguf import GGUFFile, read_config
from jpaged.models.loader import load_config
from jpaged.models.sources import DEFAULT_MODEL, resolve_source
from jpaged.plan.shapes import SHAPES


def read_model(source: str | None) -> ModelConfig:
    """The config of a model.

    Args:
        source: None or the embedded model's name, a name of `SHAPES`, a directory, a `.gguf` file,
            a `config.json`, or a hub id, of which only the config is fetched.

    Raises:
        ValueError: It is none of these.
        RuntimeError: The embedded model is not installed, or the hub cannot be reached.
    """
    if source is not None and source in SHAPES:
        return ModelConfig.from_hf(SHAPES[source])
    if source is None or source == DEFAULT_MODEL:
        path = resolve_source(None)
    else:
        path = Path(source).expanduser()
        if not path.exists():
            if source.count("/") != 1 or source.startswith((".", "~", "/")):
                known = ", ".join((DEFAULT_MODEL, *SHAPES))
                raise ValueError(
                    f"unknown model {source!r}: must be a directory, a .gguf file, a config.json, "
                    f"a hub id such as 'org/name', or one of {known}"
                )
            path = _fetch_config(source)
    if path.suffix == ".gguf":
        return read_config(GGUFFile(path))
    return orbax_io.load_config(path) if orbax_io.is_checkpoint(path) else load_config(path)


def _fetch_config(repo: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo, "config.json"))
    except Exception as error:  # the hub's client lets many kinds through
        raise RuntimeError(
            f"model {repo!r} is not a local path and its config could not be fetched from the hub "
            f"({type(error).__name__}); give a directory, or one of {', '.join(SHAPES)}"
        ) from error
