"""`jpaged serve`: from arguments to a running server."""

import argparse
import os
from pathlib import Path
from typing import Any

from jpaged.cli import engine
from jpaged.cli.serve_parser import SERVER_PREFIX

API_KEY_VARIABLE = "JPAGED_API_KEY"
_LISTS = ("served_model_names", "allowed_origins", "allowed_methods", "allowed_headers")


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to stop and returns the exit code."""
    options = engine_options(args)
    values = server_options(args)
    try:
        from jpaged.serving.server import run_server
        from jpaged.serving.settings import ServerSettings
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "jpaged":
            raise
        raise ValueError(
            f'jpaged serve needs: pip install "jpaged[serve]" (there is no {error.name})'
        ) from None
    return run_server(options, ServerSettings(**values))


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's options.

    Raises:
        ValueError: Two models are named.
    """
    options = engine.engine_options(args)
    if args.positional_model is not None:
        if "model" in options:
            raise ValueError("give either MODEL or --model, got both")
        options["model"] = args.positional_model
    return options


def server_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `ServerSettings` that were given; what files hold is read.

    Raises:
        ValueError: A file cannot be read, or holds nothing.
    """
    values = {
        name.removeprefix(SERVER_PREFIX): value
        for name, value in vars(args).items()
        if name.startswith(SERVER_PREFIX) and value is not None
    }
    for name in _LISTS:
        if name in values:
            values[name] = tuple(values[name])
    keys = [*values.pop("api_key", ()), *_keys_of(values.pop("api_key_file", None))]
    if variable := os.environ.get(API_KEY_VARIABLE):
        keys.append(variable)
    if keys:
        values["api_keys"] = tuple(dict.fromkeys(keys))
    if "chat_template" in values:
        values["chat_template"] = _read("--chat-template", values["chat_template"])
    return values


def _keys_of(file: str | None) -> list[str]:
    if file is None:
        return []
    keys = [line.strip() for line in _read("--api-key-file", file).splitlines()]
    keys = [key for key in keys if key]
    if not keys:
        raise ValueError(f"--api-key-file must hold at least one key, got none in {file}")
    return keys


def _read(flag: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {flag} {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {file} must be UTF-8 text") from error
