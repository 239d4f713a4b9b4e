"""What the TPU kernels share: when they can run."""

import functools

import jax


@functools.cache
def device_reasons() -> tuple[str, ...]:
    """Why Mosaic TPU kernels cannot run on the default device; empty if they can."""
    if jax.default_backend() != "tpu":
        return (f"the device is a {jax.default_backend()}, not a TPU",)
    return ()
