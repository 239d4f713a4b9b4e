"""Times of GPU kernels through CUPTI, and the ceilings that fractions are taken of.

Without CUPTI (on a CPU) the same functions give wall times, and say so.
"""

import collections
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from roofline import Ceilings


@dataclasses.dataclass(frozen=True, slots=True)
class Times:
    """What the calls of a session took.

    Attributes:
        calls: (kernel name, seconds) of each kernel of each call.
        clock: "cupti", or "wall" with one entry a call.
    """

    calls: list[list[tuple[str, float]]]
    clock: str

    def seconds(self, counts: Callable[[str], bool] = lambda name: True) -> float:
        """Of the kernels whose name counts, summed over a call: the median of the calls."""
        return statistics.median(
            sum(seconds for name, seconds in call if counts(name)) for call in self.calls
        )

    def by_name(self) -> dict[str, tuple[float, float]]:
        """Kernel name to launches and seconds a call, longest first."""
        launches: collections.Counter[str] = collections.Counter()
        seconds: dict[str, float] = collections.defaultdict(float)
        for call in self.calls:
            for name, kernel_seconds in call:
                launches[name] += 1
                seconds[name] += kernel_seconds
        count = len(self.calls)
        longest_first = sorted(seconds, key=lambda name: -seconds[name])
        return {name: (launches[name] / count, seconds[name] / count) for name in longest_first}

    def kernels_us(self) -> dict[str, list[float]]:
        """`by_name` for the JSON object: launches, and microseconds, a call."""
        return {
            name: [launches, round(1e6 * seconds, 3)]
            for name, (launches, seconds) in self.by_name().items()
        }


def _cupti() -> Any:
    """The CUPTI session of Mosaic GPU's profiler; None where there is none."""
    try:
        # `profiler.measure` itself calls a function twice with the same arguments, which a step
        # that donates its own does not allow and which leaves a small case's KV in the L2 cache.
        from jax.experimental.mosaic.gpu import profiler

        library: Any = vars(profiler)["mosaic_gpu_lib"]
        session = library._mosaic_gpu_ext
        return session if jax.default_backend() == "gpu" else None
    except (ImportError, AttributeError, KeyError):
        return None


def measure(
    calls: Sequence[Callable[[], Any]], repeats: int, wait: Callable[[], Any] = lambda: None
) -> Times:
    """Times of calls that launch the same kernels, made in turn.

    Args:
        calls: Each starts its work and returns arrays of JAX, or anything `wait` knows of.
        repeats: Calls at least, all together.
        wait: Called before the session ends; returns when the device is idle.
    """
    num_runs = -(-repeats // len(calls)) * len(calls)
    for call in calls:
        jax.block_until_ready(call())
    wait()
    cupti = _cupti()
    if cupti is None:
        return Times([[("wall", _wall_s(calls[i % len(calls)]))] for i in range(num_runs)], "wall")
    cupti._cupti_init()
    try:
        results = [calls[i % len(calls)]() for i in range(num_runs)]
        jax.block_until_ready(results)
        wait()
    finally:
        timings = cupti._cupti_get_timings(True)
    return Times(_split([(name, 1e-3 * ms) for name, ms in timings], num_runs), "cupti")


def _wall_s(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _split(timings: list[tuple[str, float]], num_runs: int) -> list[list[tuple[str, float]]]:
    """The kernels of each run.

    By name, since only kernels of one name are sure to be recorded in the order of their launches.
    """
    if not timings:
        raise RuntimeError("CUPTI recorded no kernel")
    of_name: dict[str, list[float]] = collections.defaultdict(list)
    for name, seconds in timings:
        of_name[name].append(seconds)
    runs: list[list[tuple[str, float]]] = [[] for _ in range(num_runs)]
    for name, kernels in of_name.items():
        for i, seconds in enumerate(kernels):
            runs[i * num_runs // len(kernels)].append((name, seconds))
    return runs


def measure_ceilings(repeats: int = 10) -> Ceilings:
    """The read and matmul ceilings of this device; on a CPU of sizes that it manages quickly."""
    on_gpu = jax.default_backend() == "gpu"
    rows, columns, side = (4096, 128256, 8192) if on_gpu else (256, 512, 256)
    keys = jax.random.split(jax.random.key(0), 3)
    vector = jax.random.normal(keys[0], (1, rows), jnp.bfloat16)

    def product_s(contract: int) -> float:
        shape = (rows, columns) if contract == 0 else (columns, rows)
        matrix = jax.random.normal(keys[1], shape, jnp.bfloat16)
        product = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (contract,)), ((), ()))))
        return measure([lambda: product(vector, matrix)], repeats).seconds()

    # XLA's kernels for the two layouts differ; the faster one is the ceiling.
    read_s = min(product_s(0), product_s(1))
    square = jax.random.normal(keys[2], (side, side), jnp.bfloat16)
    matmul = jax.jit(jnp.matmul)
    matmul_s = measure([lambda: matmul(square, square)], repeats).seconds()
    return Ceilings(read_bytes_s=2 * rows * columns / read_s, matmul_flop_s=2 * side**3 / matmul_s)
