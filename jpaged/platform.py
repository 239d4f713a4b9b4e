"""The process: what JAX has to be told of it, when it ends, and how much memory it may have.

JAX reserves three quarters of a GPU when its backend first starts. An engine sizes its own pool, so
the package asks for no preallocation and a high ceiling; that only works before the backend starts.
"""

import atexit
import contextlib
import ctypes
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_MEM_FRACTION, _OLD_MEM_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_ALLOCATOR_DEFAULTS = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", _MEM_FRACTION: "0.97"}


def set_allocator_limits() -> None:
    """Sets the GPU allocator's limits unless the user has, and warns where it comes too late."""
    import sys

    missing = {k: v for k, v in _ALLOCATOR_DEFAULTS.items() if k not in os.environ}
    if _OLD_MEM_FRACTION in os.environ:  # JAX refuses to start when it finds both names
        missing.pop(_MEM_FRACTION, None)
    if not missing:
        return
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        import jax

        if jax.default_backend() == "gpu":
            logger.warning(
                "JAX had started before jpaged was imported, so its own memory limits hold: import "
                "jpaged first, or set %s",
                " ".join(f"{k}={v}" for k, v in missing.items()),
            )
        return
    os.environ.update(missing)


def default_cache_dir() -> Path:
    """Where compiled programs are kept between runs: `$XDG_CACHE_HOME/jpaged/xla`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "jpaged" / "xla"


def set_compilation_cache(cache_dir: str | None) -> str | None:
    """Switches JAX's persistent compilation cache on and returns its directory.

    Args:
        cache_dir: A directory; "auto" for the one JAX has already been given, else the default
            one; None leaves JAX's own setting as it is.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if cache_dir is None:
        return None
    if cache_dir == "auto":
        cache_dir = jax.config.values["jax_compilation_cache_dir"] or str(default_cache_dir())
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("no compilation cache: cannot create %s (%s)", cache_dir, error.strerror)
        return None
    if jax.config.values["jax_compilation_cache_dir"] != cache_dir:
        jax.config.update("jax_compilation_cache_dir", cache_dir)
        # JAX goes on with the first directory it has used until it is told to look again.
        compilation_cache.reset_cache()
    # Every program of the plan is worth keeping, however quick its compilation.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return cache_dir


def host_memory_bytes() -> int:
    """Memory that this process may have: the machine's, or less where its cgroup is limited."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # none, or "max"
            limits.append(int(file.read_text()))
    return min(limits)


def return_freed_memory() -> None:
    """Gives memory that is free back to the system, where the C library keeps it for itself.

    glibc keeps most of what an engine's compilations and requests took: 150 MB an engine.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def call_at_exit(method: Callable[[], Any]) -> None:
    """Has a bound method called when the process ends, unless its object is gone by then.

    For threads that use JAX: they must have ended before JAX is taken down, and before finalizers
    run, on which its traces rest.
    """
    reference = weakref.WeakMethod(method)

    def call() -> None:
        if (alive := reference()) is not None:
            alive()

    # The hook that runs finalizers is registered with the first of them, and the last hook runs
    # first.
    weakref.finalize(call, int).detach()
    atexit.register(call)
