"""What this machine offers, and what an engine would make of it: for people and bug reports.

Looks only: no engine is built and nothing is written. Everything that could fail is caught and
reported, since a broken installation is what this is for.
"""

import importlib.metadata
import importlib.util
import os
import platform as host
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jpaged
from jpaged.engine_config import DEFAULT_BUDGETS, DEFAULT_CPU_CACHE_BYTES, EngineConfig
from jpaged.platform import default_cache_dir

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "tokenizers", "transformers", "gguf")
_VARIABLES = (
    "JAX_PLATFORMS",
    "JAX_COMPILATION_CACHE_DIR",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
)

Report = dict[str, Any]


def examine() -> Report:
    """Returns what is known about versions, devices, caches and choices, as plain JSON values.

    `problems` lists what keeps the engine from running, `hints` what would make it better.
    """
    # Those of the allocator may be jpaged's own defaults, set when it is imported.
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    report: Report = {
        "versions": _versions(),
        "machine": _machine(),
        "environment": variables,
        "backend": None,
        "devices": [],
        "nvidia_driver": _nvidia_gpus(),
        "default_model": None,
        "compilation_cache": None,
        "choices": {},
        "problems": _link_problems(),
        "hints": [],
    }
    try:
        _examine_jax(report)
    except Exception as error:  # whatever a broken plugin raises
        report["problems"].append(f"JAX cannot start: {_first_line(error)}")
    _examine_default_model(report)
    _add_hints(report)
    return report


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "jpaged": jpaged.__version__,
        "python": host.python_version(),
    }
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _machine() -> dict[str, Any]:
    return {
        "system": f"{host.system()} {host.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def _link_problems() -> list[str]:
    """A checkout without its links (a copy by a tool that drops them) lacks three packages."""
    return [
        f"jpaged.{name} is missing: the checkout must keep its links (git, tar and unzip do)"
        for name in ("models", "pallas_kernels", "serving")
        if importlib.util.find_spec(f"jpaged.{name}") is None
    ]


def _nvidia_gpus() -> list[str]:
    """What the NVIDIA driver sees, whether or not JAX can use it: "name, capability, memory"."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _examine_jax(report: Report) -> None:
    from jpaged.platform import set_allocator_limits

    # As the engine would, or JAX would reserve most of a GPU only to look at it.
    set_allocator_limits()
    import jax

    report["backend"] = jax.default_backend()
    report["devices"] = [_device(device) for device in jax.devices()]
    given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    directory = given or str(default_cache_dir())
    files = [file for file in Path(directory).glob("**/*") if file.is_file()]
    report["compilation_cache"] = {
        "directory": directory,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }
    report["choices"] = _choices(report["backend"], report["devices"])


def _device(device: Any) -> dict[str, Any]:
    try:
        stats = device.memory_stats() or {}
    except Exception:  # backends differ in how they say that they keep no statistics
        stats = {}
    return {
        "id": device.id,
        "kind": device.device_kind,
        "platform": device.platform,
        "compute_capability": getattr(device, "compute_capability", None),
        "memory_bytes": stats.get("bytes_limit"),
    }


def _choices(backend: str, devices: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """What an engine without options would use on this machine, and why."""
    from jpaged.models import loader

    dtype = loader.default_dtype()
    dtype_whys = {
        "float32": "a CPU computes it fastest",
        "float16": "this GPU emulates bfloat16 (compute capability below 8.0)",
        "bfloat16": "native on this accelerator",
    }
    seqs, tokens = DEFAULT_BUDGETS.get(backend, DEFAULT_BUDGETS["cpu"])
    if backend == "cpu":
        pool = f"{DEFAULT_CPU_CACHE_BYTES / 2**30:.0f} GiB"
        pool_why = "on a CPU the pool shares memory with everything else; --kv-cache-memory-bytes"
    else:
        share = EngineConfig().memory_utilization
        pool = f"what weights and step leave of {share:.0%} of the memory"
        pool_why = "sized after both are known; --memory-utilization"
    return {
        "device": {
            "use": f"{backend} ({devices[0]['kind']})",
            "why": "JAX's default; JAX_PLATFORMS chooses another",
        },
        "dtype": {"use": dtype, "why": f"{dtype_whys[dtype]}; --dtype"},
        "kernels": _kernels(),
        "block pool": {"use": pool, "why": pool_why},
        "budgets": {
            "use": f"{seqs} sequences, {tokens} tokens a step",
            "why": f"default on {backend}; --max-num-seqs, --max-num-batched-tokens",
        },
    }


def _kernels() -> dict[str, str]:
    from jpaged.pallas_kernels import mosaic_gpu, mosaic_tpu

    else_xla = "what no kernel serves goes to xla, which is logged"
    if not mosaic_tpu.device_reasons():
        sizes = ", ".join(map(str, (mosaic_tpu.LANES // 2, *mosaic_tpu.ROW_SIZES)))
        return {
            "use": "mosaic_tpu: paged_attention, write_kv, copy_blocks",
            "why": f"a TPU; head_dim {sizes}, bfloat16 or float32; {else_xla}",
        }
    if reasons := mosaic_gpu.device_reasons():
        return {"use": "xla", "why": f"no Mosaic GPU kernels: {'; '.join(reasons)}"}
    return {"use": "mosaic_gpu", "why": f"Hopper; {else_xla}"}


def _examine_default_model(report: Report) -> None:
    try:
        from jpaged.models.sources import DEFAULT_MODEL, resolve_source

        path = resolve_source(None)
        report["default_model"] = {
            "name": DEFAULT_MODEL,
            "path": str(path),
            "bytes": path.stat().st_size,
        }
    except RuntimeError as error:
        report["hints"].append(_first_line(error))
    except Exception as error:  # a broken installation is what this command is for
        report["problems"].append(f"models cannot be imported: {_first_line(error)}")


def _add_hints(report: Report) -> None:
    hints = report["hints"]
    is_cpu = report["backend"] == "cpu"
    asked_for_cpu = "cpu" in os.environ.get("JAX_PLATFORMS", "").lower()
    if is_cpu and report["nvidia_driver"] and not asked_for_cpu:
        plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
        if any(importlib.util.find_spec(name) for name in plugins):
            hints.append(
                "the NVIDIA driver sees a GPU and JAX's CUDA plugin is installed, but JAX runs on "
                "the CPU: look for a warning at `import jax` (driver too old, wrong versions?)"
            )
        else:
            hints.append(
                "the NVIDIA driver sees a GPU but JAX has no CUDA plugin: "
                'pip install "jpaged[cuda]"'
            )
    has_tpu = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if is_cpu and has_tpu and not asked_for_cpu and not importlib.util.find_spec("libtpu"):
        hints.append('this may be a TPU machine, without libtpu: pip install "jpaged[tpu]"')
    cache = report["compilation_cache"]
    if cache and not cache["files"]:
        hints.append("the compilation cache is empty: `jpaged compile` fills it ahead of need")


def render(report: Report) -> str:
    """The report as text for a person."""
    machine = report["machine"]
    lines = ["versions"]
    lines += [f"  {name:<13} {value or 'missing'}" for name, value in report["versions"].items()]
    lines += [
        "machine",
        f"  {machine['system']}, {machine['cpus']} CPUs, {_size(machine['memory_bytes'])} memory",
    ]
    lines += [f"  NVIDIA driver sees: {gpu}" for gpu in report["nvidia_driver"]]
    lines += [f"  {name}={value}" for name, value in report["environment"].items()]
    lines.append("devices" + (f" (backend {report['backend']})" if report["backend"] else ""))
    for device in report["devices"]:
        memory = f", {_size(device['memory_bytes'])}" if device["memory_bytes"] else ""
        capability = device["compute_capability"]
        capability = f", compute capability {capability}" if capability else ""
        lines.append(f"  {device['platform']}:{device['id']}  {device['kind']}{capability}{memory}")
    model, cache = report["default_model"], report["compilation_cache"]
    lines.append("default model")
    lines.append(
        f"  {model['name']}, {_size(model['bytes'])}, {model['path']}"
        if model
        else "  not installed"
    )
    if cache:
        lines.append("compilation cache")
        lines.append(f"  {cache['directory']}: {cache['files']} files, {_size(cache['bytes'])}")
    if report["choices"]:
        lines.append("would be used")
    for name, choice in report["choices"].items():
        lines.append(f"  {name:<13} {choice['use']}  ({choice['why']})")
    for title in ("problems", "hints"):
        if report[title]:
            lines.append(title)
            lines += [f"  - {text}" for text in report[title]]
    return "\n".join(lines) + "\n"


def _size(num_bytes: int) -> str:
    for bits, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << bits:
            return f"{num_bytes / (1 << bits):.1f} {unit}"
    return f"{num_bytes} B"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
