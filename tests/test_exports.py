"""The public names are what `__all__` says, and importing the package stays cheap."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jpaged
from jpaged.engine_config import EngineConfig
from jpaged.llm import LLM

ROOT = Path(__file__).parents[1]
PACKAGES = ("jpaged", "jpaged.models", "jpaged.pallas_kernels", "jpaged.serving")


@pytest.mark.parametrize("name", PACKAGES)
def test_every_exported_name_exists(name):
    package = importlib.import_module(name)
    exported = getattr(package, "__all__", [])
    assert len(exported) == len(set(exported))
    for export in exported:
        assert getattr(package, export) is not None


def test_public_api_has_the_promised_names():
    promised = {
        "LLM",
        "AsyncLLM",
        "CompletionOutput",
        "EngineConfig",
        "RequestOutput",
        "SamplingParams",
    }
    assert promised <= set(jpaged.__all__)
    assert set(jpaged.__all__) <= set(dir(jpaged))


@pytest.mark.parametrize("name", jpaged.__all__)
def test_public_name_is_documented(name):
    assert inspect.getdoc(getattr(jpaged, name))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'jpaged' has no attribute 'LMM'"):
        _ = jpaged.LMM  # pyright: ignore[reportAttributeAccessIssue]


def test_llm_takes_every_engine_option():
    options = set(EngineConfig.__dataclass_fields__)
    parameters = inspect.signature(LLM).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert takes_any or options <= parameters.keys()


def test_importing_the_package_imports_no_jax():
    code = "import sys, jpaged; print(sorted({'jax', 'flax', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_importing_the_kernels_imports_no_pallas():
    code = (
        "import sys, jpaged.models.llama, jpaged.pallas_kernels;"
        "print([name for name in sys.modules if name.startswith('jax.experimental.pallas')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_changelog_names_this_version():
    heading = re.search(r"^## \[?(\d[^\s\]]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading[1] == jpaged.__version__
