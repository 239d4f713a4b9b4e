"""Settings of every test run."""

import os
import shutil
import tempfile

import hypothesis
import pytest

# XLA's CPU client has as many threads as cores; the interpreter of GPU kernels blocks one for every
# warpgroup that waits, and would never end with two.
os.environ.setdefault("NPROC", "16")

hypothesis.settings.register_profile(
    "ci",
    # A run proves the same thing every time, on however slow a machine.
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_CACHE_KEY = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Gives the run, its workers and every process it starts a compilation cache of its own."""
    if hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist has the environment of the process that started it
    directory = tempfile.mkdtemp(prefix="jpaged-tests-")
    config.stash[_CACHE_KEY] = directory
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the cache."""
    directory = config.stash.get(_CACHE_KEY, None)
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)
