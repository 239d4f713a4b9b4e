"""Which of the hosts this one is, and where the leader is: as given, or as a TPU VM knows it.

Cloud TPU VMs tell by a metadata server, pods of Kubernetes by their environment.
"""

import dataclasses
import os
import urllib.request

from jpaged.engine_config import EngineConfig

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_TIMEOUT_S = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """This host among the others.

    Attributes:
        rank: 0 leads.
        leader: Address of the leader.
        port: Its port; the next one is the one of JAX's own service.
    """

    rank: int
    leader: str
    port: int


def locate(config: EngineConfig) -> Location:
    """Where this process stands.

    Raises:
        ValueError: Nothing was given, and no TPU VM says it either.
    """
    if config.node_rank is not None and config.master_addr is not None:
        return Location(config.node_rank, config.master_addr, config.master_port)
    rank, addresses = _of_tpu_vm()
    if len(addresses) != config.nnodes or not 0 <= rank < len(addresses):
        raise ValueError(
            f"nnodes must be the {len(addresses)} hosts of this TPU slice, of which this is number "
            f"{rank}, got {config.nnodes}"
        )
    return Location(rank, addresses[0], config.master_port)


def _of_tpu_vm() -> tuple[int, list[str]]:
    """This worker's number and the addresses of all."""
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    number = os.environ.get("TPU_WORKER_ID")
    try:
        if not names or number is None:
            number, names = _metadata("agent-worker-number"), _metadata("worker-network-endpoints")
        return int(number), [_address(worker) for worker in names.split(",")]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"nnodes above 1 needs node_rank and master_addr where no TPU VM tells them ({error})"
        ) from error


def _address(worker: str) -> str:
    """An address out of `address`, `address:port` or `name:id:address`."""
    parts = worker.strip().split(":")
    return parts[2] if len(parts) == 3 else parts[0]


def _metadata(key: str) -> str:
    request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        return answer.read().decode().strip()
