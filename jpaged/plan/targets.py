"""The machines that can be planned for, with the numbers that decide what fits and how fast it is.

Names of TPUs are Google's: `v5e-8` and `v6e-8` count chips, `v5p-8` and `tpu7x-8` count cores, of
which a chip has two: 4 chips. JAX shows a v5p chip as one device and each core of a tpu7x as one.
`CHIP:AxBxC` names a slice by its topology, counted in chips. GPUs are named with their number,
`h200-8`; without one it is a single GPU.

Sources: peak FLOP/s, memory rates and interconnects of TPUs are those of Google's pages on each
(cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x), per chip; usable memory is the limit that libtpu's
compiler itself states; clocks are peak FLOP/s over FLOPs a cycle, those of v5p and tpu7x unsure.
Figures of GPUs are of NVIDIA's data sheets for SXM boards (L4 and T4: PCIe cards), memory as
`nvidia-smi` reports it.
"""

import dataclasses
import math
from typing import Literal

GIB = 2**30
MIB = 2**20


CHIPS_OF_SLICE_HOST = 4
"""TPU chips of a host of a slice of several, whatever one host alone may have."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One device as JAX counts them, and how they make a machine.

    Attributes:
        platform: Who makes the program: the TPU compiler, or nobody here.
        memory_bytes: What a program may use of the device's memory.
        read_bytes_s: Sustained reads of the memory.
        matmul_flop_s: Sustained FLOP/s of 16-bit matrix products.
        attention_flop_s: Sustained FLOP/s of attention of prompts.
        link_bytes_s: What a device sends at once in an all-reduce: both directions of a ring.
        link_latency_s: Of one hop of it.
        dtype: What weights are kept in unless said otherwise.
        clock_hz: TPUs: turns the compiler's cycles into seconds.
        decode_cycles: TPUs: cycles of our decode kernel a token of context and KV head, from its
            schedule (benchmarks/results/tpu_static.json: 8 KV heads, blocks of 16).
        has_kernels: GPUs: whether our attention kernels run there; else it is plain XLA.
        cores_of_name: TPUs: what the number in a name counts, a chip: itself or its two cores.
        devices_of_chip: TPUs: JAX devices of a chip.
        chips_of_host: TPUs: chips of the largest machine with one host.
        accelerator: TPUs: how libtpu's names of such machines begin.
    """

    platform: Literal["tpu", "gpu"]
    memory_bytes: int
    read_bytes_s: float
    matmul_flop_s: float
    attention_flop_s: float
    link_bytes_s: float
    link_latency_s: float = 1e-6
    dtype: str = "bfloat16"
    clock_hz: float = 0.0
    decode_cycles: float = 0.0
    has_kernels: bool = True
    cores_of_name: int = 1
    devices_of_chip: int = 1
    chips_of_host: int = 8
    accelerator: str = ""

    def hops(self, num_devices: int) -> int:
        """How many one after another a sum over so many devices takes: a ring, or a switch."""
        return 2 * (num_devices - 1) if self.platform == "tpu" else 2

    def bound_name(self, bound: str) -> str:
        """What people call the limit of a part: "memory", "compute", "links" or "fixed"."""
        names = {"memory": "HBM", "compute": "MXU", "links": "ICI"}
        if self.platform == "gpu":
            names = {"memory": "memory", "compute": "tensor cores", "fixed": "launches"}
        return names.get(bound, bound)


def _chunk_flop_s(cycles: int, clock_hz: float) -> float:
    """FLOP/s of the chunk kernel: a tile of 128 queries and 512 tokens takes so many cycles.

    All 32 heads of 128 elements; the cycles are those of docs/tpu.md for a tile with a mask.
    """
    return 4 * 128 * 512 * 32 * 128 / cycles * clock_hz


# Of a ring through a slice each chip uses two of its ports, in both directions: ports carry 50 GB/s
# each way on v5e and 100 on the others. The two devices of a tpu7x chip share them in one ring.
_TPUS = {
    "v5e": Device(
        platform="tpu",
        memory_bytes=int(15.75 * GIB),
        read_bytes_s=819e9,
        matmul_flop_s=197e12,
        attention_flop_s=_chunk_flop_s(11_096, 1.5e9),
        link_bytes_s=100e9,
        clock_hz=1.5e9,
        decode_cycles=1.96 / 8,
        accelerator="v5litepod",
    ),
    "v5p": Device(
        platform="tpu",
        memory_bytes=int(95.73 * GIB),
        read_bytes_s=2765e9,
        matmul_flop_s=459e12,
        # A kernel runs on one of the chip's two cores.
        attention_flop_s=_chunk_flop_s(11_092, 1.75e9),
        link_bytes_s=200e9,
        clock_hz=1.75e9,
        decode_cycles=1.96 / 8,
        cores_of_name=2,
        chips_of_host=4,
        accelerator="v5p",
    ),
    "v6e": Device(
        platform="tpu",
        memory_bytes=int(31.24 * GIB),
        read_bytes_s=1638e9,
        matmul_flop_s=918e12,
        attention_flop_s=_chunk_flop_s(6_052, 1.75e9),
        link_bytes_s=200e9,
        clock_hz=1.75e9,
        decode_cycles=1.86 / 8,
        accelerator="v6e",
    ),
    "tpu7x": Device(
        platform="tpu",
        memory_bytes=int(94.74 * GIB),
        read_bytes_s=3690e9,
        matmul_flop_s=1153.5e12,
        attention_flop_s=_chunk_flop_s(6_095, 1.9e9),
        link_bytes_s=200e9,
        clock_hz=1.9e9,
        decode_cycles=1.88 / 8,
        cores_of_name=2,
        devices_of_chip=2,
        chips_of_host=4,
        accelerator="tpu7x",
    ),
}

# What an H200 was measured to reach of its data sheet (benchmarks/results/step_h200.json,
# attention_h200.json: 4.58 of 4.8 TB/s, 822 of 989 TFLOP/s, 650 of them in attention); other GPUs
# are taken to reach the same shares, which nobody here has measured.
_READ, _MATMUL, _ATTENTION = 4.58 / 4.8, 822 / 989, 650 / 989
# A sum over two H200s within one program took 25 us for 0.5 MB and 280 us for 64 MB: 250 of the 450
# GB/s that NVLink carries each way.
_LINK, _LINK_LATENCY_S = 250 / 450, 12e-6
# JAX gives a program this share of a GPU (jpaged.platform).
_ALLOCATOR = 0.97


def _gpu(
    memory_mib: int,
    tb_s: float,
    tflop_s: float,
    link_gb_s: float,
    *,
    dtype: str = "bfloat16",
    has_kernels: bool = False,
) -> Device:
    return Device(
        platform="gpu",
        memory_bytes=int(memory_mib * MIB * _ALLOCATOR),
        read_bytes_s=tb_s * 1e12 * _READ,
        matmul_flop_s=tflop_s * 1e12 * _MATMUL,
        attention_flop_s=tflop_s * 1e12 * _ATTENTION,
        link_bytes_s=link_gb_s * 1e9 * _LINK,
        link_latency_s=_LINK_LATENCY_S,
        dtype=dtype,
        has_kernels=has_kernels,
    )


_GPUS = {
    "h200": _gpu(143_771, 4.8, 989, 450, has_kernels=True),
    "h100": _gpu(81_559, 3.35, 989, 450, has_kernels=True),
    "a100-80": _gpu(81_920, 2.039, 312, 300),
    "a100-40": _gpu(40_960, 1.555, 312, 300),
    "l4": _gpu(23_034, 0.3, 121, 32),
    "t4": _gpu(15_360, 0.32, 65, 16, dtype="float16"),
}
DEVICES = _TPUS | _GPUS

# Slices by their number of chips, as Google offers them.
_TOPOLOGIES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TOPOLOGIES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_NUM_AXES = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3}
_MAX_GPUS = 8

DEFAULT_TARGETS = ("v5e-8", "v6e-1", "v6e-8", "v5p-8", "tpu7x-8", "h100", "h200")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A machine: so many devices of a kind.

    Attributes:
        name: As it was asked for.
        kind: Key of `DEVICES`.
        device: What each of its devices can do.
        num_devices: As JAX counts them.
        topology: TPUs: `AxBxC` in chips.
    """

    name: str
    kind: str
    device: Device
    num_devices: int
    topology: str = ""

    @property
    def num_chips(self) -> int:
        """Chips of the machine; a GPU is one."""
        return self.num_devices // self.device.devices_of_chip

    @property
    def num_hosts(self) -> int:
        """Hosts that hold its chips."""
        if self.num_chips <= self.device.chips_of_host:
            return 1
        is_slice = self.device.platform == "tpu"
        return -(
            -self.num_chips // (CHIPS_OF_SLICE_HOST if is_slice else self.device.chips_of_host)
        )

    @property
    def accelerator_type(self) -> str:
        """TPUs: what libtpu calls such a machine."""
        return f"{self.device.accelerator}-{self.num_chips * self.device.cores_of_name}"

    @property
    def topology_name(self) -> str:
        """TPUs: what JAX calls its topology."""
        return f"{self.kind}:{self.topology}"


def known_targets() -> str:
    """What `parse_target` takes, in one line."""
    tpus = [f"{kind}-{{{','.join(map(str, _sizes(kind)))}}}" for kind in _TPUS]
    return (
        f"{', '.join(tpus)} (v5p-8 and tpu7x-8 are 4 chips), a TPU topology such as v5p:4x4x4, "
        f"and {', '.join(_GPUS)} with -N for 2 to {_MAX_GPUS} of them"
    )


def parse_target(name: str) -> Target:
    """The machine of this name.

    Raises:
        ValueError: There is none; lists those there are.
    """
    text = name.strip().lower()
    kind, _, shape = text.partition(":")
    if shape and kind in _TPUS:
        if shape in _topologies(kind):
            return _tpu(name, kind, shape)
        raise ValueError(
            f"target {name!r}: the topology must be one of {', '.join(_topologies(kind))}"
        )
    if text in _GPUS:
        return Target(name=name, kind=text, device=_GPUS[text], num_devices=1)
    kind, _, number = text.rpartition("-")
    if number.isdecimal():
        if kind in _TPUS and int(number) in _sizes(kind):
            return _tpu(name, kind, _sizes(kind)[int(number)])
        if kind in _GPUS and 1 <= int(number) <= _MAX_GPUS:
            return Target(name=name, kind=kind, device=_GPUS[kind], num_devices=int(number))
    raise ValueError(f"unknown target {name!r}; known ones: {known_targets()}")


def siblings(target: Target) -> list[str]:
    """Names of the machines of the same devices, from small to large."""
    if target.device.platform == "tpu":
        return [f"{target.kind}-{size}" for size in _sizes(target.kind)]
    return [target.kind, *(f"{target.kind}-{n}" for n in (2, 4, 8) if n <= _MAX_GPUS)]


def _tpu(name: str, kind: str, topology: str) -> Target:
    device = _TPUS[kind]
    num_devices = _num_chips(topology) * device.devices_of_chip
    return Target(name=name, kind=kind, device=device, num_devices=num_devices, topology=topology)


def _topologies(kind: str) -> tuple[str, ...]:
    return _TOPOLOGIES_2D if _NUM_AXES[kind] == 2 else _TOPOLOGIES_3D


def _sizes(kind: str) -> dict[int, str]:
    """The numbers of a kind's names, and the topology each stands for."""
    of_name = _TPUS[kind].cores_of_name
    return {_num_chips(topology) * of_name: topology for topology in _topologies(kind)}


def _num_chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))
