"""The measurements behind choices for CPUs: alternatives side by side, in one run.

- matrices: a step of the default model's shapes without attention, weights stored [in, out] or
  [out, in], by number of rows; with the time of its compilation
- attention: 30 layers of decode attention over 32 sequences of 100 to 720 tokens, by the size of
  the context tile and the number of rows that go together
- argmax: over the vocabulary, plain or in two levels
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from jpaged.pallas_kernels import paged_attention
from jpaged.pallas_kernels.paged_attention import xla
from jpaged.pallas_kernels.paged_attention.cases import Case, make
from jpaged.token_choice import argmax

HIDDEN, LAYERS, WIDTH, VOCAB, QKV = 576, 30, 1536, 49152, 960


def measure(function: Callable[..., Any], *args: Any, repeats: int) -> tuple[float, float]:
    """Seconds to compile, and the median milliseconds of a call."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compile_s = time.perf_counter() - start
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return compile_s, 1e3 * statistics.median(times)


def measure_matrices(repeats: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def draw(size_in: int, size_out: int) -> np.ndarray:
        return rng.standard_normal((size_in, size_out), dtype=np.float32) * 0.02

    shapes = ((HIDDEN, QKV), (HIDDEN, HIDDEN), (HIDDEN, 2 * WIDTH), (WIDTH, HIDDEN))
    layers = [[draw(*shape) for shape in shapes] for _ in range(LAYERS)]
    table = jnp.asarray(draw(VOCAB, HIDDEN))
    found = []
    for order, axis in (("[in, out]", 0), ("[out, in]", 1)):
        weights = [
            [jnp.asarray(np.ascontiguousarray(w if axis == 0 else w.T)) for w in layer]
            for layer in layers
        ]

        def times(x: jax.Array, w: jax.Array, axis: int = axis) -> jax.Array:
            return jax.lax.dot_general(x, w, (((1,), (axis,)), ((), ())))

        def step(weights: Any, table: jax.Array, ids: jax.Array, times: Any = times) -> jax.Array:
            x = table[ids]
            for qkv, out, gate_up, down in weights:
                x = x + times(times(x, qkv)[:, :HIDDEN], out)
                gate, up = jnp.split(times(x, gate_up), 2, axis=1)
                x = x + times(jax.nn.silu(gate) * up, down)
            return jax.lax.dot_general(x, table, (((1,), (1,)), ((), ())))

        for rows in (1, 4, 32):
            ids = jnp.arange(rows)
            compile_s, ms = measure(step, weights, table, ids, repeats=repeats)
            found.append({"weights": order, "rows": rows, "compile_s": compile_s, "ms": ms})
    return found


def measure_attention(repeats: int) -> list[dict[str, Any]]:
    lengths = tuple(range(100, 740, 20))
    case = Case(name="decode", query_lens=(1,) * 32, seq_lens=lengths, num_heads=9, num_kv_heads=3)
    arrays = make(case, jnp.float32)

    def layers(arrays: dict[str, Any]) -> jax.Array:
        q = arrays["q"]
        for _ in range(LAYERS):
            q = paged_attention(**{**arrays, "q": q}, max_query_len=1)
        return q

    found = []
    default = xla.TILE_KV, xla.DECODE_GROUP_CPU
    try:
        for tile in (64, 128, 256):
            for rows in (1, 2, 4, 8):
                xla.TILE_KV, xla.DECODE_GROUP_CPU = tile, rows
                jax.clear_caches()
                compile_s, ms = measure(layers, arrays, repeats=repeats)
                found.append({"tile": tile, "rows": rows, "compile_s": compile_s, "ms": ms})
    finally:
        xla.TILE_KV, xla.DECODE_GROUP_CPU = default
    return found


def measure_argmax(repeats: int) -> list[dict[str, Any]]:
    found = []
    for rows in (1, 64):
        logits = jnp.asarray(np.random.default_rng(0).standard_normal((rows, VOCAB)), jnp.float32)
        for name, function in (("plain", lambda x: jnp.argmax(x, axis=1)), ("two levels", argmax)):
            _, ms = measure(function, logits, repeats=repeats)
            found.append({"argmax": name, "rows": rows, "ms": ms})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    common.add_output_argument(parser)
    args = parser.parse_args()
    if jax.default_backend() != "cpu":
        parser.error("this benchmark is about CPUs: set JAX_PLATFORMS=cpu")
    results: dict[str, Any] = {"benchmark": "cpu_choices", "dtype": "float32"}
    for name, run in (
        ("matrices", measure_matrices),
        ("attention", measure_attention),
        ("argmax", measure_argmax),
    ):
        results[name] = found = run(args.repeats)
        print(name)
        common.print_table(list(found[0]), [list(row.values()) for row in found])
    common.finish(results, args.json)


if __name__ == "__main__":
    main()
