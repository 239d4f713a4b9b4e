"""What hosts must have in common, and how a process of several is started and ended."""

import dataclasses
import importlib.metadata
import logging
import os
import socket
import sys
import threading
from typing import Any, NoReturn

import jaxlib.version

import jpaged
from jpaged.engine_config import EngineConfig
from jpaged.multihost.location import Location

logger = logging.getLogger(__name__)

AGREED = (
    "model",
    "revision",
    "load_format",
    "tensor_parallel_size",
    "nnodes",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_dtype",
    "num_blocks",
    "kv_cache_memory_bytes",
    "memory_utilization",
    "preemption_mode",
    "swap_space",
    "host_cache",
    "max_logprobs",
)
"""Options that every host must be given alike."""
_OWN = ("node_rank", "master_addr", "master_port", "compilation_cache_dir")
"""Options that stay a host's own; the rest is as the leader has it."""

END_TIMEOUT_S = 60
"""How long hosts wait for each other at the end: for a compilation under way."""
_LOSS_GRACE_S = 10
# Seconds and counts, so that a silent host is noticed after 20 s; the last, in milliseconds, is for
# a host to which something was sent.
_KEEP_ALIVE = (
    ("TCP_KEEPIDLE", 5),
    ("TCP_KEEPINTVL", 5),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", 20_000),
)


def facts(config: EngineConfig) -> dict[str, Any]:
    """What must be the same on all hosts: versions, and options by their names."""
    found: dict[str, Any] = {"version": jpaged.__version__, "jaxlib": jaxlib.version.__version__}
    for name in ("jax", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {name: getattr(config, name) for name in AGREED}


def difference(leader: dict[str, Any], other: dict[str, Any], rank: int) -> str | None:
    """The first thing on which two hosts differ, as a sentence; None if there is none."""
    for name, value in leader.items():
        if other.get(name) != value:
            return (
                f"{name} must be the same on all hosts, got {value!r} on the host of rank 0 and "
                f"{other.get(name)!r} on that of rank {rank}"
            )
    return None


def shared_options(config: EngineConfig) -> dict[str, Any]:
    """What the leader tells of its config."""
    options = dataclasses.asdict(config)
    return {name: value for name, value in options.items() if name not in _OWN}


def start_jax(location: Location, num_hosts: int) -> None:
    """Joins JAX's processes, unless the caller has already; must come before JAX's first use."""
    # Hosts would share the tuning of a program's kernels, and each wait for the others to compile
    # the same one; they compile in orders of their own.
    if os.path.exists("/dev/nvidiactl"):
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_shard_autotuning=false".strip()
    import jax

    if jax.distributed.is_initialized():
        return
    # It would have SIGTERM not end the process.
    jax.config.update("jax_enable_preemption_service", False)
    address = _host_and_port(location.leader, location.port + 1)
    jax.distributed.initialize(
        address,
        num_hosts,
        location.rank,
        cluster_detection_method="deactivate",
        shutdown_timeout_seconds=END_TIMEOUT_S,
        coordinator_bind_address=address,
    )


def stop_jax() -> None:
    """Leaves JAX's processes; returns when all have."""
    import jax

    jax.distributed.shutdown()


def prepare(connection: socket.socket) -> None:
    """Has a connection send at once, and end soon after its other end is gone without a word."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def end_process(code: int) -> NoReturn:
    """Ends the process without JAX's own end, which would wait for hosts that are gone."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_process_soon(after_s: float = _LOSS_GRACE_S) -> threading.Timer:
    """Ends the process in a while whatever it waits for, with exit code 1, unless cancelled."""
    timer = threading.Timer(after_s, end_process, (1,))
    timer.daemon = True
    timer.start()
    return timer


def one_line(error: BaseException) -> str:
    """An error as it is told to other hosts."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _host_and_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
