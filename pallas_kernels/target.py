"""Which kind of device the kernels are chosen for: the default one, unless said otherwise."""

import jax

_named: str | None = None


def set_target_platform(platform: str | None) -> None:
    """Chooses kernels for a kind of device that need not be here, in programs lowered for it.

    For the whole process and for what is traced from now on: JAX keeps what it has traced, so it
    must be said before.

    Args:
        platform: "tpu" or "cpu"; None for the default device's.

    Raises:
        ValueError: It is another one. Kernels for GPUs ask the GPU what it can.
    """
    global _named
    if platform not in ("tpu", "cpu", None):
        raise ValueError(f"platform must be 'tpu', 'cpu' or None, got {platform!r}")
    _named = platform


def target_platform() -> str:
    """The kind of device that kernels are chosen for."""
    return jax.default_backend() if _named is None else _named
