"""jpaged: LLM serving in JAX with a paged KV cache."""

from typing import TYPE_CHECKING, Any

from jpaged import platform as _platform

if TYPE_CHECKING:
    from jpaged.async_engine import AsyncLLM as AsyncLLM
    from jpaged.engine_config import EngineConfig as EngineConfig
    from jpaged.errors import EngineDeadError as EngineDeadError
    from jpaged.llm import LLM as LLM
    from jpaged.outputs import BeamSearchOutput as BeamSearchOutput
    from jpaged.outputs import BeamSearchSequence as BeamSearchSequence
    from jpaged.outputs import CompletionOutput as CompletionOutput
    from jpaged.outputs import Logprob as Logprob
    from jpaged.outputs import RequestOutput as RequestOutput
    from jpaged.sampling_params import BeamSearchParams as BeamSearchParams
    from jpaged.sampling_params import RequestOutputKind as RequestOutputKind
    from jpaged.sampling_params import SamplingParams as SamplingParams
    from jpaged.structured_outputs_params import (
        StructuredOutputsParams as StructuredOutputsParams,
    )

__version__ = "0.1.0"

# Name to module: importing the package must not import JAX, so that its memory limits can be set
# first and `jpaged --help` is instant.
_EXPORTS = {
    "AsyncLLM": "jpaged.async_engine",
    "BeamSearchOutput": "jpaged.outputs",
    "BeamSearchParams": "jpaged.sampling_params",
    "BeamSearchSequence": "jpaged.outputs",
    "CompletionOutput": "jpaged.outputs",
    "EngineConfig": "jpaged.engine_config",
    "EngineDeadError": "jpaged.errors",
    "LLM": "jpaged.llm",
    "Logprob": "jpaged.outputs",
    "RequestOutput": "jpaged.outputs",
    "RequestOutputKind": "jpaged.sampling_params",
    "SamplingParams": "jpaged.sampling_params",
    "StructuredOutputsParams": "jpaged.structured_outputs_params",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "EngineConfig",
    "EngineDeadError",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
]

_platform.set_allocator_limits()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'jpaged' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
