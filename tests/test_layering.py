"""Imports point one way: command line > serving > jpaged > models > pallas_kernels > jax."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("pallas_kernels", "models", "jpaged", "serving")
LINKED = {"pallas_kernels", "models", "serving"}

# The host side of the engine: deterministic, and testable without a device.
HOST_MODULES = (
    "beam_search",
    "block_manager",
    "block_pool",
    "host_pool",
    "host_tier",
    "output_processor",
    "outputs",
    "preemption",
    "prefix_cache",
    "prompts",
    "request",
    "request_reader",
    "sampling_params",
    "scheduler",
    "scheduler_output",
    "sequence_end",
    "token_outputs",
    "tokenizer",
)
DEVICE_PACKAGES = {"jax", "jaxlib", "flax"}


def python_files(folder: str) -> list[Path]:
    # Of the real folders only: jpaged/models and so on are links to them.
    files = sorted((ROOT / folder).rglob("*.py"))
    return [file for file in files if not LINKED & set(file.relative_to(ROOT / folder).parts)]


def imported_names(source: str) -> Iterator[str]:
    """Every module that the source imports, at whatever depth; a relative one starts with dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            # `from jpaged import models` imports a module too.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "jpaged":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LINKED else "jpaged"


def violations(folder: str, source: str, *, is_command: bool = False) -> list[str]:
    found = []
    # The command line starts the server, so that it is above it.
    allowed = LAYERS if is_command else LAYERS[: LAYERS.index(folder) + 1]
    for name in imported_names(source):
        parts = name.split(".")
        layer = layer_of(name)
        if name.startswith("."):
            found.append(f"relative import of {name}")
        elif parts[0] in LINKED:
            found.append(f"{name} must be imported as jpaged.{name}")
        elif name != "jpaged" and layer is not None and layer not in allowed:
            found.append(f"upward import of {name}")
        elif folder == "serving" and parts[0] in DEVICE_PACKAGES:
            found.append(f"{name} in serving, which must not touch devices")
    return found


@pytest.mark.parametrize("folder", LAYERS)
def test_folder_imports_only_downwards(folder):
    found = [
        f"{file.relative_to(ROOT)}: {text}"
        for file in python_files(folder)
        for text in violations(
            folder, file.read_text(), is_command=file.is_relative_to(ROOT / "jpaged" / "cli")
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("folder", "source", "expected"),
    [
        ("pallas_kernels", "from jpaged.models import layers", "upward import"),
        ("pallas_kernels", "import jpaged.config", "upward import"),
        ("models", "from jpaged import tokenizer", "upward import"),
        ("models", "def f():\n    import jpaged.engine", "upward import"),
        ("jpaged", "import jpaged.serving.app", "upward import"),
        ("jpaged", "from models import llama", "must be imported as"),
        ("jpaged", "from . import config", "relative import"),
        ("serving", "import jax.numpy as jnp", "must not touch devices"),
    ],
)
def test_a_violation_is_found(folder, source, expected):
    assert any(expected in text for text in violations(folder, source))


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("models", "from jpaged.pallas_kernels import paged_attention"),
        ("jpaged", "from jpaged.models.loader import load_model"),
        ("serving", "import jpaged\nfrom jpaged.async_engine import AsyncLLM"),
    ],
)
def test_downward_imports_are_allowed(folder, source):
    assert not violations(folder, source)


def test_only_the_command_line_may_start_the_server():
    source = "from jpaged.serving.server import run_server"
    assert violations("jpaged", source)
    assert not violations("jpaged", source, is_command=True)


def test_no_file_is_missed():
    assert all(python_files(folder) for folder in LAYERS)


@pytest.mark.parametrize("module", HOST_MODULES)
def test_host_module_names_no_device_package(module):
    source = (ROOT / "jpaged" / f"{module}.py").read_text()
    roots = {name.split(".")[0] for name in imported_names(source)}
    assert not roots & DEVICE_PACKAGES


def test_host_modules_load_no_device_package():
    code = "import sys\n"
    code += "".join(f"import jpaged.{module}\n" for module in HOST_MODULES)
    code += f"print(sorted({DEVICE_PACKAGES!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
