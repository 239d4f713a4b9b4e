"""Which class serves which architecture name."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jpaged.models.llama import LlamaForCausalLM
from jpaged.models.mistral import MistralForCausalLM
from jpaged.models.qwen2 import Qwen2ForCausalLM
from jpaged.models.qwen3 import Qwen3ForCausalLM

ARCHITECTURES: Mapping[str, type[LlamaForCausalLM]] = MappingProxyType(
    {
        family.__name__: family
        for family in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
    }
)


def resolve_architecture(names: str | Sequence[str]) -> type[LlamaForCausalLM]:
    """Returns the class for the first name that is known.

    Raises:
        ValueError: none is; the text lists those that are.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    got = ", ".join(names) or "none"
    raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {got}")
