"""Paged attention on one GPU: kernel times against the ceilings of the same run, and peers.

Usage: python benchmarks/attention.py [--only decode prefill mixed] [--quick] [--json FILE]

Times are those of all kernels that one call launches (CUPTI), the median of the calls. "attention"
is the Mosaic kernels, whatever merges their partial results included; "schedule" is all else that a
call launches, which a model does once a step for all layers. Where no Mosaic kernel runs, all is
attention.

  decode   GB/s of the K and V of live tokens, as a fraction of the read ceiling; physical blocks
           permuted; small cases go over several sets of blocks, so that the L2 cache holds none
  prefill  FLOP/s of the visible pairs, as a fraction of the matmul ceiling; chunks are the last
           tokens of their context
  mixed    one call with decodes and chunks, against two calls

On a CPU (`--tiny`) times are wall times and mean nothing; it shows that the script runs.
"""

import argparse
import dataclasses
import functools
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import common
import jax
import jax.numpy as jnp
import kernel_times
import numpy as np
from roofline import Ceilings, visible_pairs

from jpaged.pallas_kernels import KVCacheSpec, paged_attention

# Of K and V read between two uses of a block: several times the L2 cache of an H200.
MIN_ROTATED_BYTES = 300_000_000
# Of jax's own kernel: k_splits, pages_per_compute_block, num_warps.
JAX_OPTIONS = ((16, 8, 8), (16, 8, 4), (4, 8, 4), (4, 8, 8), (1, 16, 4))
PEERS = ("jax", "cudnn", "torch", "flash_attn", "flashinfer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A ragged batch: query and context length of each sequence."""

    name: str
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of the live tokens, in bf16."""
        return 2 * 2 * self.num_kv_heads * self.head_dim * sum(self.seq_lens)

    @property
    def flops(self) -> float:
        """FLOPs of the visible pairs."""
        pairs = sum(map(visible_pairs, self.query_lens, self.seq_lens))
        return 4.0 * self.num_heads * self.head_dim * pairs

    @property
    def max_query_len(self) -> int | None:
        """As an engine's step knows it."""
        return 1 if max(self.query_lens) == 1 else None

    def tiny(self) -> "Case":
        """The same kind of batch for a CPU."""
        lens = list(zip(self.query_lens, self.seq_lens, strict=True))[:6]
        return dataclasses.replace(
            self,
            query_lens=tuple(-(-q // 128) for q, _ in lens),
            seq_lens=tuple(-(-s // 128) for _, s in lens),
            head_dim=self.head_dim // 8,
        )


def decode_case(name: str, num_seqs: int, context: int, **options: int) -> Case:
    return Case(name=name, query_lens=(1,) * num_seqs, seq_lens=(context,) * num_seqs, **options)


def decode_cases() -> list[Case]:
    """The cases that a peer also runs."""
    rng = random.Random(0)
    sizes = ((64, 4096), (256, 1024), (8, 32768))
    small = ((32, 2048), (32, 512), (1, 8192))
    ragged = Case(
        name="128 x 1..8192",
        query_lens=(1,) * 128,
        seq_lens=tuple(rng.randint(1, 8192) for _ in range(128)),
    )
    return [
        *(decode_case(f"{n} x {context}", n, context) for n, context in sizes),
        ragged,
        *(decode_case(f"{n} x {context}", n, context) for n, context in small),
    ]


def decode_variants() -> list[Case]:
    """Other block sizes, numbers of heads and head sizes, all with about 1 GB of K and V."""
    return [
        decode_case("64 x 4096, block 64", 64, 4096, block_size=64),
        decode_case("64 x 4096, block 128", 64, 4096, block_size=128),
        decode_case("128 x 4096, 16/4 heads", 128, 4096, num_heads=16, num_kv_heads=4),
        decode_case("256 x 4096, 8/2 heads", 256, 4096, num_heads=8, num_kv_heads=2),
        decode_case("32 x 1600, 40/40 heads", 32, 1600, num_heads=40, num_kv_heads=40),
        decode_case("128 x 4096, D 64", 128, 4096, head_dim=64),
        decode_case("32 x 4096, D 256", 32, 4096, head_dim=256),
    ]


def prefill_cases() -> list[Case]:
    """Whole prompts, and the last chunk of long ones."""
    sizes = ((1, 16384, 16384), (1, 4096, 4096), (1, 2048, 30720), (8, 512, 8192))
    return [
        Case(
            name=f"{n} x {q} causal" if q == s else f"{n} x {q} of {s}",
            query_lens=(q,) * n,
            seq_lens=(s,) * n,
        )
        for n, q, s in sizes
    ]


def mixed_cases() -> list[Case]:
    """Decodes, and chunks."""
    return [
        decode_case("64 x 1024", 64, 1024),
        Case(name="4 x 512 of 2048", query_lens=(512,) * 4, seq_lens=(2048,) * 4),
    ]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A case on the device: one pool, and as many sets of blocks as are gone through in turn."""

    q: jax.Array
    pool: jax.Array
    block_tables: list[jax.Array]
    seq_lens: jax.Array
    query_start_loc: jax.Array


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def make_inputs(case: Case) -> Inputs:
    """Random bf16 inputs; the physical blocks of a sequence are scattered over the pool."""
    rng = np.random.default_rng(0)
    num_blocks = [-(-length // case.block_size) for length in case.seq_lens]
    num_sets = 1
    if case.max_query_len == 1 and jax.default_backend() == "gpu":
        num_sets = -(-MIN_ROTATED_BYTES // case.kv_bytes)
    spec = KVCacheSpec(
        block_size=case.block_size,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=jnp.dtype(jnp.bfloat16),
    )
    pool_blocks = num_sets * sum(num_blocks) + 1
    permuted = iter(rng.permutation(np.arange(1, pool_blocks, dtype=np.int32)))
    tables = np.zeros((num_sets, len(num_blocks), max(num_blocks)), np.int32)
    for table in tables:
        for row, count in zip(table, num_blocks, strict=True):
            row[:count] = [next(permuted) for _ in range(count)]
    keys = jax.random.split(jax.random.key(0))
    starts = np.cumsum((0, *case.query_lens), dtype=np.int32)
    return Inputs(
        q=_normal(keys[0], (int(starts[-1]), case.num_heads, case.head_dim)),
        pool=_normal(keys[1], spec.shape(pool_blocks)),
        block_tables=[jnp.asarray(table) for table in tables],
        seq_lens=jnp.asarray(case.seq_lens, jnp.int32),
        query_start_loc=jnp.asarray(starts),
    )


@functools.partial(jax.jit, static_argnames="max_query_len")
def attend(
    q: jax.Array,
    pool: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    *,
    max_query_len: int | None,
) -> jax.Array:
    """One layer's attention, and the schedule that it needs."""
    return paged_attention(
        q, pool, block_tables, seq_lens, query_start_loc, max_query_len=max_query_len
    )


def calls_of(case: Case, inputs: Inputs) -> list[Callable[[], jax.Array]]:
    """One call for each set of blocks."""
    return [
        functools.partial(
            attend,
            inputs.q,
            inputs.pool,
            tables,
            inputs.seq_lens,
            inputs.query_start_loc,
            max_query_len=case.max_query_len,
        )
        for tables in inputs.block_tables
    ]


def is_mosaic(kernel: str) -> bool:
    """Whether a kernel of this name was written in Mosaic GPU."""
    return "mosaic_gpu" in kernel


def run_ours(case: Case, inputs: Inputs, repeats: int) -> dict[str, Any]:
    """Microseconds of attention and of the schedule, and the kernels one by one."""
    calls = calls_of(case, inputs)
    if not bool(jnp.isfinite(calls[0]()).all()):
        raise RuntimeError(f"{case.name}: the output is not finite")
    times = kernel_times.measure(calls, repeats)
    has_mosaic = any(map(is_mosaic, times.by_name()))
    return {
        "shape": dataclasses.asdict(case) if len(set(case.seq_lens)) > 2 else _short(case),
        "clock": times.clock,
        "attention_us": 1e6 * times.seconds(is_mosaic if has_mosaic else lambda name: True),
        "schedule_us": 1e6 * times.seconds(lambda name: has_mosaic and not is_mosaic(name)),
        "kernels_us": times.kernels_us(),
    }


def _short(case: Case) -> dict[str, Any]:
    """A case of few different lengths."""
    pairs = zip(case.query_lens, case.seq_lens, strict=True)
    counts: dict[str, int] = {}
    for query_len, seq_len in pairs:
        name = f"{query_len} of {seq_len}"
        counts[name] = counts.get(name, 0) + 1
    sizes = {k: getattr(case, k) for k in ("num_heads", "num_kv_heads", "head_dim", "block_size")}
    return {"sequences": counts, **sizes}


def attempt(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, or why it could not: a peer that is not there must not end the run."""
    try:
        return run()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def run_jax(case: Case, inputs: Inputs, repeats: int, quick: bool) -> dict[str, Any]:
    """Microseconds of the kernel that jax ships, with the best of its options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import paged_attention as shipped

    # Its pools are [num_kv_heads, num_blocks, block_size, head_dim], and its tables a whole number
    # of splits wide.
    k, v = (jnp.moveaxis(inputs.pool[:, i], 1, 0).copy() for i in (0, 1))
    width = 1 << (inputs.block_tables[0].shape[1] - 1).bit_length()
    tables = [jnp.pad(t, ((0, 0), (0, width - t.shape[1]))) for t in inputs.block_tables]
    # It leaves the scale to its caller.
    q = inputs.q * case.head_dim**-0.5
    best: dict[str, Any] = {}
    for k_splits, pages, num_warps in JAX_OPTIONS[: 2 if quick else None]:
        if width % k_splits or (width // k_splits) % min(width // k_splits, pages):
            continue
        call = functools.partial(
            shipped.paged_attention,
            k_splits=k_splits,
            pages_per_compute_block=pages,
            num_warps=num_warps,
            interpret=jax.default_backend() == "cpu",
        )
        calls = [functools.partial(call, q, k, v, table, inputs.seq_lens) for table in tables]
        us = 1e6 * kernel_times.measure(calls, repeats).seconds()
        if not best or us < best["us"]:
            best = {"us": us, "k_splits": k_splits, "pages": pages, "num_warps": num_warps}
    return best


def run_cudnn(case: Case, repeats: int) -> dict[str, Any]:
    """Microseconds of cuDNN's attention over contiguous K and V."""
    q, k, v = _contiguous(case)
    name = "cudnn" if jax.default_backend() == "gpu" else "xla"

    @jax.jit
    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=name)

    times = kernel_times.measure([lambda: call(q, k, v)], repeats)
    return {"us": 1e6 * times.seconds(), "kernels_us": times.kernels_us()}


def _contiguous(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(1), 3)
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    q, k, v = (
        _normal(key, (1, case.seq_lens[0], num, case.head_dim))
        for key, num in zip(keys, heads, strict=True)
    )
    return q, k, v


def run_torch(case: Case, repeats: int, library: str) -> dict[str, Any]:
    """Microseconds of a PyTorch library's attention over contiguous K and V."""
    import torch  # pyright: ignore[reportMissingImports]

    def draw(num_heads: int) -> Any:
        shape = (1, case.seq_lens[0], num_heads, case.head_dim)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    q, k, v = draw(case.num_heads), draw(case.num_kv_heads), draw(case.num_kv_heads)
    if library == "torch":
        from torch.nn.attention import (  # pyright: ignore[reportMissingImports]
            SDPBackend,
            sdpa_kernel,
        )

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))

        def call() -> Any:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )

    elif library == "flash_attn":
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

        call = functools.partial(flash_attn_func, q, k, v, causal=True)
    else:
        import flashinfer  # pyright: ignore[reportMissingImports]

        call = functools.partial(
            flashinfer.single_prefill_with_kv_cache, q[0], k[0], v[0], causal=True
        )
    times = kernel_times.measure([call], repeats, wait=torch.cuda.synchronize)
    return {"us": 1e6 * times.seconds(), "kernels_us": times.kernels_us()}


def scale(cases: list[Case], args: argparse.Namespace) -> list[Case]:
    """The cases, or small ones of their kind."""
    return [case.tiny() for case in cases] if args.tiny else cases


def measure_ours(case: Case, args: argparse.Namespace) -> tuple[dict[str, Any], Inputs]:
    """`run_ours`, or why it could not, and what it ran on."""
    inputs = make_inputs(case)
    run = functools.partial(run_ours, case, inputs, args.repeats)
    result = {"case": case.name, **attempt(case.name, run)}
    print(f"{case.name}: {number(result, 'attention_us')} us", file=sys.stderr, flush=True)
    return result, inputs


def decode_section(args: argparse.Namespace, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """A result of each decode case."""
    compared = scale(decode_cases(), args)
    for case in [*compared, *scale(decode_variants(), args)]:
        result, inputs = measure_ours(case, args)
        floor_us = 1e6 * case.kv_bytes / ceilings.read_bytes_s
        result |= {
            "kv_mb": 1e-6 * case.kv_bytes,
            "block_sets": len(inputs.block_tables),
            "floor_us": floor_us,
        }
        if "jax" in args.peers and case in compared:
            run = functools.partial(run_jax, case, inputs, args.repeats, args.quick)
            result["jax"] = attempt("jax", run)
        if "attention_us" in result:
            result["gb_s"] = 1e-3 * case.kv_bytes / result["attention_us"]
            result["fraction"] = floor_us / result["attention_us"]
            if "us" in result.get("jax", {}):
                result["speedup_over_jax"] = result["jax"]["us"] / result["attention_us"]
        yield result


def prefill_section(args: argparse.Namespace, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """A result of each prefill case."""
    for case in scale(prefill_cases(), args):
        result, _ = measure_ours(case, args)
        result["floor_us"] = floor_us = 1e6 * case.flops / ceilings.matmul_flop_s
        if "attention_us" in result:
            result["tflop_s"] = 1e-6 * case.flops / result["attention_us"]
            result["fraction"] = floor_us / result["attention_us"]
        if case.query_lens == case.seq_lens:
            for peer in args.peers:
                if peer == "jax":
                    continue
                run = functools.partial(run_cudnn, case, args.repeats)
                if peer != "cudnn":
                    run = functools.partial(run_torch, case, args.repeats, peer)
                result[peer] = attempt(peer, run)
                if "us" in result[peer]:
                    result[peer]["tflop_s"] = 1e-6 * case.flops / result[peer]["us"]
        yield result


def mixed_section(args: argparse.Namespace) -> dict[str, Any]:
    """Decodes alone, chunks alone, both in one call."""
    decodes, chunks = scale(mixed_cases(), args)
    both = dataclasses.replace(
        decodes,
        name="both",
        query_lens=decodes.query_lens + chunks.query_lens,
        seq_lens=decodes.seq_lens + chunks.seq_lens,
    )
    results = [measure_ours(case, args)[0] for case in (decodes, chunks, both)]
    times = [result["attention_us"] for result in results if "attention_us" in result]
    ratio = times[2] / (times[0] + times[1]) if len(times) == 3 else None
    return {"cases": results, "ratio": ratio}


def number(result: dict[str, Any], key: str) -> Any:
    """A number of a result, or a dash."""
    return result.get(key, "-")


def print_decode(results: list[dict[str, Any]]) -> None:
    header = ["decode", "KV MB", "us", "schedule us", "floor us", "GB/s", "fraction"]
    keys = ("kv_mb", "attention_us", "schedule_us", "floor_us", "gb_s", "fraction")
    rows = []
    for r in results:
        peer = [number(r.get("jax", {}), "us"), number(r, "speedup_over_jax")]
        rows.append([r["case"], *(number(r, key) for key in keys), *peer])
    common.print_table([*header, "jax us", "ratio"], rows)


def print_prefill(results: list[dict[str, Any]], peers: list[str]) -> None:
    shown = [peer for peer in peers if peer != "jax"]
    header = ["prefill", "us", "schedule us", "TFLOP/s", "fraction"]
    keys = ("attention_us", "schedule_us", "tflop_s", "fraction")
    rows = [
        [r["case"], *(number(r, key) for key in keys)]
        + [number(r.get(peer, {}), "tflop_s") for peer in shown]
        for r in results
    ]
    common.print_table(header + [f"{peer} TFLOP/s" for peer in shown], rows)


def print_mixed(results: dict[str, Any]) -> None:
    keys = ("attention_us", "schedule_us")
    rows = [[r["case"], *(number(r, key) for key in keys)] for r in results["cases"]]
    common.print_table(["mixed", "us", "schedule us"], rows)
    if results["ratio"] is not None:
        print(f"both / (decodes + chunks): {results['ratio']:.3f} (aim: at most 1)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = ("decode", "prefill", "mixed")
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["jax", "cudnn"])
    parser.add_argument("--repeats", type=int, help="calls of a case; 20, or 10 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and options of peers")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    common.add_output_argument(parser)
    args = parser.parse_args()
    if args.repeats is None:
        args.repeats = 10 if args.quick else 20
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")

    ceilings = kernel_times.measure_ceilings()
    if jax.default_backend() != "gpu":
        print("no GPU: wall times instead of kernel times, and ceilings of small sizes")
    print(
        f"ceilings: read {1e-12 * ceilings.read_bytes_s:.3g} TB/s, "
        f"matmul {1e-12 * ceilings.matmul_flop_s:.4g} TFLOP/s"
    )
    results: dict[str, Any] = {
        "benchmark": "attention",
        "dtype": "bfloat16",
        "repeats": args.repeats,
        "read_ceiling_bytes_s": ceilings.read_bytes_s,
        "matmul_ceiling_flop_s": ceilings.matmul_flop_s,
    }
    if "decode" in args.only:
        results["decode"] = []
        for result in decode_section(args, ceilings):
            results["decode"].append(result)
            common.write(results | {"is_whole": False}, args.json)
        print_decode(results["decode"])
    if "prefill" in args.only:
        results["prefill"] = []
        for result in prefill_section(args, ceilings):
            results["prefill"].append(result)
            common.write(results | {"is_whole": False}, args.json)
        print_prefill(results["prefill"], args.peers)
    if "mixed" in args.only:
        results["mixed"] = mixed_section(args)
        print_mixed(results["mixed"])
    common.finish(results | {"is_whole": True}, args.json)
    measured = [*results.get("decode", []), *results.get("prefill", [])]
    if any("error" in r for r in [*measured, *results.get("mixed", {}).get("cases", [])]):
        raise SystemExit("some case failed")


if __name__ == "__main__":
    main()
