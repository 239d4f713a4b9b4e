import logging
import os
import subprocess
import sys

import jax
import jax._src.xla_bridge
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jpaged import platform

NAMES = (
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)


@pytest.fixture
def environment(monkeypatch):
    """An environment without the allocator's variables, which the test may fill."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def _limits():
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def _pretend(monkeypatch, *, started, backend="cpu"):
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: started)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)


def test_limits_are_set_before_jax_starts(environment):
    _pretend(environment, started=False)
    platform.set_allocator_limits()
    assert _limits() == {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_CLIENT_MEM_FRACTION": "0.97",
    }


def test_the_users_limits_hold(environment):
    _pretend(environment, started=False)
    environment.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    environment.setenv("XLA_CLIENT_MEM_FRACTION", "0.4")
    platform.set_allocator_limits()
    assert _limits() == {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "XLA_CLIENT_MEM_FRACTION": "0.4",
    }


def test_a_fraction_under_its_old_name_is_not_set_again(environment):
    """JAX refuses to start where both names are set."""
    _pretend(environment, started=False)
    environment.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")
    platform.set_allocator_limits()
    assert _limits() == {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4",
    }


def test_coming_too_late_on_a_gpu_is_told(environment, caplog):
    _pretend(environment, started=True, backend="gpu")
    with caplog.at_level(logging.WARNING, "jpaged"):
        platform.set_allocator_limits()
    assert _limits() == {}
    (record,) = caplog.records
    assert "JAX had started before jpaged was imported" in record.message
    assert "XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_CLIENT_MEM_FRACTION=0.97" in record.message


def test_coming_too_late_elsewhere_does_not_matter(environment, caplog):
    _pretend(environment, started=True)
    platform.set_allocator_limits()
    assert _limits() == {}
    assert not caplog.records


def test_a_user_who_has_set_everything_is_not_warned(environment, caplog):
    _pretend(environment, started=True, backend="gpu")
    environment.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    environment.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")
    platform.set_allocator_limits()
    assert not caplog.records


def test_importing_the_package_sets_the_limits_and_imports_no_jax():
    code = (
        "import sys, os, jpaged\n"
        "assert 'LLM' in dir(jpaged)\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'jax', 'jaxlib', 'flax',"
        " 'numpy', 'transformers', 'torch', 'tokenizers'}),"
        " os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'], os.environ['XLA_CLIENT_MEM_FRACTION'])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["[]", "false", "0.97"]


def test_unknown_names_of_the_package_are_refused():
    import jpaged

    with pytest.raises(AttributeError, match="module 'jpaged' has no attribute 'LLMs'"):
        _ = jpaged.LLMs  # pyright: ignore[reportAttributeAccessIssue]


def test_the_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert platform.default_cache_dir() == tmp_path / "jpaged" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert platform.default_cache_dir() == tmp_path / ".cache" / "jpaged" / "xla"


@pytest.fixture
def jax_cache():
    """Gives JAX back its cache settings."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_cache_directory_is_made_and_used(jax_cache, tmp_path):
    directory = str(tmp_path / "a" / "b")
    assert platform.set_compilation_cache(directory) == directory
    assert os.path.isdir(directory)
    assert jax.config.values["jax_compilation_cache_dir"] == directory
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0.0


def test_another_cache_directory_is_used_from_then_on(jax_cache, tmp_path):
    for number in range(2):
        directory = tmp_path / str(number)
        platform.set_compilation_cache(str(directory))
        jax.jit(lambda x, number=number: x + number).lower(1.0).compile()
        assert list(directory.iterdir()), f"directory {number} is used"


def test_auto_keeps_a_directory_that_jax_was_given(jax_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert platform.set_compilation_cache("auto") == str(tmp_path)


def test_auto_takes_the_default_directory_otherwise(jax_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    assert platform.set_compilation_cache("auto") == str(tmp_path / "jpaged" / "xla")


def test_no_directory_leaves_jax_alone(jax_cache):
    before = jax.config.values["jax_compilation_cache_dir"]
    assert platform.set_compilation_cache(None) is None
    assert jax.config.values["jax_compilation_cache_dir"] == before


def test_a_directory_that_cannot_be_made_is_told_and_done_without(jax_cache, caplog, tmp_path):
    (tmp_path / "file").touch()
    assert platform.set_compilation_cache(str(tmp_path / "file" / "cache")) is None
    assert "no compilation cache: cannot create" in caplog.text


def test_threads_are_ended_before_finalizers_run():
    script = """
import weakref

from jpaged import platform


class Worker:
    def stop(self):
        print("stopped")


kept, dropped = Worker(), Worker()
platform.call_at_exit(kept.stop)
platform.call_at_exit(dropped.stop)
del dropped
weakref.finalize(kept, print, "finalized")
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "stopped\nfinalized\n"


def test_host_memory_is_the_machines_or_its_cgroups(monkeypatch, tmp_path):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(platform, "_CGROUP_LIMITS", (tmp_path / "missing", limit))
    assert platform.host_memory_bytes() == machine
    for text, expected in (("max\n", machine), ("4096\n", 4096), (f"{2**63 - 1}\n", machine)):
        limit.write_text(text)
        assert platform.host_memory_bytes() == expected


def test_freed_memory_goes_back_to_the_system():
    program = """if True:
        import resource
        from jpaged import platform

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * resource.getpagesize()

        # Small pieces with one at the end that stays: the heap cannot shrink by itself.
        pieces = [bytearray(4000) for _ in range(20_000)]
        last = bytearray(4000)
        held = resident()
        del pieces
        platform.return_freed_memory()
        print(held - resident())
    """
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONMALLOC": "malloc"},
    )
    assert int(result.stdout) > 40_000_000
