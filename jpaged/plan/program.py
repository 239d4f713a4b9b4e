"""What runs in a compiled TPU program beside XLA's own work, from the program's text."""

import re
from collections import Counter

_KERNEL = re.compile(
    r"^\s+(?:ROOT )?%?([A-Za-z_]\w*)[\w.]* = .*custom_call_target=\"tpu_custom_call\""
)
_VMEM = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)
# Asynchronous ones come in two halves, of which the first counts.
_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def kernels(hlo: str) -> dict[str, int]:
    """How often each Pallas kernel stands in a program, by the name it was given.

    Args:
        hlo: The optimised program as text.
    """
    return dict(Counter(match[1] for match in map(_KERNEL.match, hlo.splitlines()) if match))


def kernel_vmem_bytes(hlo: str) -> int:
    """VMEM that the Pallas kernel with the most of it has; 0 without kernels.

    Args:
        hlo: The optimised program as text.
    """
    lines = filter(_KERNEL.match, hlo.splitlines())
    return max((int(match[1]) for match in map(_VMEM.search, lines) if match), default=0)


def collectives(hlo: str) -> dict[str, int]:
    """How often devices exchange something, by how they do.

    Args:
        hlo: The optimised program as text.
    """
    return dict(Counter(match[1] for match in _COLLECTIVE.finditer(hlo)))
