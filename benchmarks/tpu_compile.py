"""Compiles the TPU kernels for TPUs that are not there, by the package `libtpu` on any Linux host.

    python -m benchmarks.tpu_compile --chip v6e [--only attention_decode_16] [--dump DIR]

Prints one JSON object a kernel: seconds of compilation, temporary and aliased bytes. A process
compiles for one generation, since libtpu reads its environment once.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

# Topology and what libtpu calls its machine.
CHIPS = {
    "v5e": ("v5e:2x2", "v5litepod-4"),
    "v5p": ("v5p:2x2x1", "v5p-8"),
    "v6e": ("v6e:2x2", "v6e-4"),
    "tpu7x": ("tpu7x:2x2x1", "tpu7x-8"),
}
BLOCK_SIZES = (16, 32, 64, 128)
# Tokens of a decode's tile; rows of logits of a KV head, and tokens of context, of a chunk's.
DECODE_TILES = (256, 512, 1024, 2048)
CHUNK_TILES = ((256, 512), (512, 256), (512, 512), (512, 1024), (1024, 512))
_TPU_INFERENCE = "tpu_inference.kernels.ragged_paged_attention.v3.kernel"
# Schedules that tell cycles, and no other of some seventy passes.
_PASSES = ".*(final|packed-bundles-post-ra|delay).*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A function to compile: its arguments, which one is updated in place, the kernel to dump."""

    name: str
    make: Callable[[], Callable]
    args: tuple[tuple[tuple[int, ...], str], ...]
    donated: int | None = None
    kernel: str = "jpaged_attention_decode.1"


def _attention(*, sizes: dict[str, int] | None = None, **options: Any) -> Callable:
    from jpaged.pallas_kernels.paged_attention import mosaic_tpu

    if sizes is not None:
        options["sizes"] = mosaic_tpu.TileSizes(**sizes)
    return functools.partial(mosaic_tpu.paged_attention, scale=0.1, **options)


def _write_kv() -> Callable:
    from jpaged.pallas_kernels import write_kv

    return functools.partial(write_kv, implementation="mosaic_tpu")


def _rope_write_kv(num_heads: int) -> Callable:
    from jpaged.pallas_kernels import rope_write_kv

    return functools.partial(rope_write_kv, num_heads=num_heads, implementation="mosaic_tpu")


def _copy_blocks() -> Callable:
    from jpaged.pallas_kernels import copy_blocks_mosaic_tpu

    return copy_blocks_mosaic_tpu.copy_blocks


def _pool(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int) -> tuple[int, ...]:
    if head_dim == 64:  # merged
        return (num_blocks, 1, num_kv_heads, block_size, 128)
    return (num_blocks, 2, num_kv_heads, block_size, head_dim)


def _attention_problem(
    name: str,
    *,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    block_size: int = 16,
    num_tokens: int = 64,
    num_seqs: int = 64,
    max_blocks: int = 256,
    dtype: str = "bfloat16",
    **options: Any,
) -> Problem:
    pool = _pool(8192, heads[1], block_size, head_dim)
    return Problem(
        name=name,
        make=lambda: _attention(**options),
        args=(
            ((num_tokens, heads[0], head_dim), "bfloat16"),
            (pool, dtype),
            ((num_seqs, max_blocks), "int32"),
            ((num_seqs,), "int32"),
            ((num_seqs + 1,), "int32"),
        ),
    )


def problems() -> Iterator[Problem]:
    """What has to compile: 32 query and 8 KV heads, head_dim 128, block_size 16 unless named."""
    decode = functools.partial(_attention_problem, max_query_len=1)
    mixed = functools.partial(_attention_problem, num_tokens=2048, num_seqs=16)
    for size in BLOCK_SIZES:
        yield decode(f"attention_decode_{size}", block_size=size)
    yield mixed("attention_mixed")
    yield dataclasses.replace(
        mixed("attention_chunk", num_seqs=1, max_blocks=512),
        kernel="jpaged_attention_chunks.1",
    )
    yield mixed("attention_mixed_window_soft_cap", sliding_window=1024, soft_cap=30.0)
    yield mixed("attention_3_kv_heads", heads=(24, 3), block_size=32)
    yield mixed("attention_one_query_head_each", heads=(8, 8), block_size=128)
    yield mixed("attention_head_dim_256", heads=(16, 8), head_dim=256, block_size=32)
    yield decode("attention_million_block_ids", max_blocks=1_000_000 // 64)
    for size in (16, 128):
        pool = ((2048, 2, 8, size, 128), "bfloat16")
        for num_tokens in (64, 2048):
            rows = ((num_tokens, 8, 128), "bfloat16")
            yield Problem(
                name=f"write_kv_{size}_of_{num_tokens}_tokens",
                make=_write_kv,
                args=(pool, rows, rows, ((num_tokens,), "int32")),
                donated=0,
                kernel="jpaged_write_kv.1",
            )
            angles = ((num_tokens, 64), "float32")
            qkv = ((num_tokens, (32 + 2 * 8) * 128), "bfloat16")
            yield Problem(
                name=f"rope_write_kv_{size}_of_{num_tokens}_tokens",
                make=functools.partial(_rope_write_kv, 32),
                args=(pool, qkv, angles, angles, ((num_tokens,), "int32")),
                donated=0,
                kernel="jpaged_rope.1",
            )
        ids = ((16,), "int32")
        yield Problem(
            name=f"copy_blocks_{size}", make=_copy_blocks, args=(pool, ids, ids), donated=0
        )

    yield from _eight_bits()
    yield from _smollm2_135m()


def tile_sizes() -> Iterator[Problem]:
    """`attention_decode_32` and `attention_chunk` in tiles of other sizes than ours."""
    for tokens in DECODE_TILES:
        yield _attention_problem(
            f"attention_decode_32_tile_{tokens}",
            block_size=32,
            max_query_len=1,
            sizes={"kv_bytes": tokens * 4096},
        )
    for rows, tokens in CHUNK_TILES:
        sizes = {"chunk_rows": rows, "chunk_tokens": tokens, "chunk_elements": rows * 8 * 128}
        chunk = _attention_problem(
            f"attention_chunk_tile_{rows}x{tokens}",
            num_tokens=2048,
            num_seqs=1,
            max_blocks=512,
            sizes=sizes,
        )
        yield dataclasses.replace(chunk, kernel="jpaged_attention_chunks.1")


def _eight_bits() -> Iterator[Problem]:
    """Pools of 8 bits, whose blocks have 32 tokens at least."""
    decode = functools.partial(_attention_problem, max_query_len=1)
    for name, dtype in (("int8", "int8"), ("fp8", "float8_e4m3fn")):
        for size in BLOCK_SIZES[1:]:
            yield decode(f"attention_decode_{size}_{name}", block_size=size, dtype=dtype)
        yield _attention_problem(
            f"attention_mixed_32_{name}", num_tokens=2048, num_seqs=16, block_size=32, dtype=dtype
        )
        yield decode(
            f"smollm2_attention_decode_32_{name}",
            heads=(9, 3),
            head_dim=64,
            block_size=32,
            dtype=dtype,
        )
        pool = ((2048, 2, 8, 32, 128), dtype)
        rows, ids = ((64, 8, 128), "bfloat16"), ((16,), "int32")
        in_place = functools.partial(Problem, donated=0)
        args = (pool, rows, rows, ((64,), "int32"))
        yield in_place(name=f"write_kv_32_{name}", make=_write_kv, args=args)
        yield in_place(name=f"copy_blocks_32_{name}", make=_copy_blocks, args=(pool, ids, ids))


def _smollm2_135m() -> Iterator[Problem]:
    """The default model's shape: 9 query and 3 KV heads of 64."""
    heads, head_dim, num_tokens = (9, 3), 64, 256
    attention = functools.partial(_attention_problem, heads=heads, head_dim=head_dim)
    yield attention("smollm2_attention_decode", max_query_len=1)
    yield attention("smollm2_attention_mixed", num_tokens=2048, num_seqs=16)
    pool = (_pool(8192, heads[1], 16, head_dim), "bfloat16")
    rows = ((num_tokens, heads[1], head_dim), "bfloat16")
    slots, angles = ((num_tokens,), "int32"), ((num_tokens, head_dim // 2), "float32")
    qkv = ((num_tokens, (heads[0] + 2 * heads[1]) * head_dim), "bfloat16")
    ids = ((16,), "int32")
    in_place = functools.partial(Problem, donated=0)
    yield in_place(name="smollm2_write_kv", make=_write_kv, args=(pool, rows, rows, slots))
    args = (pool, qkv, angles, angles, slots)
    make = functools.partial(_rope_write_kv, heads[0])
    yield in_place(name="smollm2_rope_write_kv", make=make, args=args)
    yield in_place(name="smollm2_copy_blocks", make=_copy_blocks, args=(pool, ids, ids))


def has_tpu_inference() -> bool:
    """Whether the kernels of the package `tpu-inference` can be imported."""
    try:
        importlib.import_module(_TPU_INFERENCE)
    except ImportError:
        return False
    return True


def peers() -> Iterator[Problem]:
    """Other kernels, decoding as `attention_decode_16` and `_128` do; one also as the chunk."""
    yield from _jax_peers()
    for size in (16, 128):
        yield _tpu_inference(
            f"tpu_inference_v3_decode_{size}",
            block_size=size,
            kernel=f"RPAd-p_{size}-bq_1_1-bkv_4096_4096.1",
            decode_sizes=(1, 4096, 1, 4096),
        )
    yield _tpu_inference(
        "tpu_inference_v3_chunk",
        block_size=128,
        num_tokens=2048,
        num_seqs=1,
        kernel="RPAm-p_128-bq_128_128-bkv_512_512.1",
        chunk_sizes=(128, 512, 128, 512),
    )


def _tpu_inference(
    name: str,
    *,
    block_size: int,
    kernel: str,
    num_tokens: int = 64,
    num_seqs: int = 64,
    decode_sizes: tuple[int, ...] = (1, 128, 1, 128),
    chunk_sizes: tuple[int, ...] = (8, 128, 8, 128),
) -> Problem:
    """Its ragged paged attention: of the two kernels in it the one not asked for is small."""
    rows = ((num_tokens, 8, 128), "bfloat16")
    ids = "int32"
    return Problem(
        name=name,
        make=functools.partial(
            _tpu_inference_attention, d_block_sizes=decode_sizes, m_block_sizes=chunk_sizes
        ),
        args=(
            ((num_tokens, 32, 128), "bfloat16"),
            rows,
            rows,
            ((65536 // block_size, block_size, 8, 2, 128), "bfloat16"),
            ((num_seqs,), ids),
            ((num_seqs * 8192 // block_size,), ids),
            ((num_seqs + 1,), ids),
            ((3,), ids),
        ),
        kernel=kernel,
    )


def _tpu_inference_attention(**sizes: tuple[int, ...]) -> Callable:
    kernel = importlib.import_module(_TPU_INFERENCE)
    generation = re.search(r"\d", os.environ["TPU_ACCELERATOR_TYPE"])
    assert generation is not None
    # It asks the device, which is a CPU here.
    vars(kernel)["get_tpu_version"] = lambda: int(generation[0])
    return functools.partial(
        kernel.ragged_paged_attention, vmem_limit_bytes=100 * 2**20, sm_scale=0.1, **sizes
    )


def _jax_peers() -> Iterator[Problem]:
    q, ids = ((64, 32, 128), "bfloat16"), "int32"
    for size, pages in ((16, 32), (128, 8)):
        pages_of = 4096 // size
        half = ((8, 2048, size, 128), "bfloat16")
        yield Problem(
            name=f"jax_paged_attention_{size}_by_{pages}",
            make=functools.partial(_jax_paged_attention, pages),
            args=(q, half, half, ((64,), ids), ((64, pages_of), ids)),
            kernel="paged_attention.1",
        )
        yield Problem(
            name=f"jax_ragged_paged_attention_{size}_by_{pages}",
            make=functools.partial(_jax_ragged_paged_attention, pages),
            args=(
                q,
                ((2048, size, 16, 128), "bfloat16"),
                ((64,), ids),
                ((64, pages_of), ids),
                ((65,), ids),
                ((1,), ids),
            ),
            kernel="ragged_paged_attention_kernel.1",
        )


def _jax_paged_attention(pages: int) -> Callable:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    return functools.partial(paged_attention, pages_per_compute_block=pages)


def _jax_ragged_paged_attention(pages: int) -> Callable:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    return functools.partial(
        ragged_paged_attention,
        num_kv_pages_per_block=pages,
        num_queries_per_block=8,
        vmem_limit_bytes=64 * 2**20,
    )


def prepare(chip: str, dump: str | None = None, kernel: str = "") -> None:
    """Sets what libtpu reads as it is loaded; before JAX starts.

    Args:
        chip: One of `CHIPS`.
        dump: Where to write the schedules of `kernel`, an instruction's exact name.
        kernel: See `dump`.

    Raises:
        RuntimeError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("needs the TPU compiler: pip install libtpu")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE=CHIPS[chip][1],
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        JAX_PLATFORMS="cpu",
        JAX_ENABLE_COMPILATION_CACHE="false",
    )
    if dump is not None:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
            f"--xla_jf_dump_only_matching_hlo={kernel} "
            f"--xla_jf_dump_llo_pass_label_regex={_PASSES}"
        )


def compile_problem(problem: Problem, chip: str) -> dict[str, Any]:
    """Compiles a problem for one chip and says what came out; `prepare` must have been called."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    from jpaged.pallas_kernels import set_target_platform

    set_target_platform("tpu")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in problem.args]
    start = time.perf_counter()
    donated = () if problem.donated is None else problem.donated
    step = jax.jit(problem.make(), donate_argnums=donated)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # where JAX's kernels find their chip
        compiled = step.trace(*args).lower(lowering_platforms=("tpu",)).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return {
        "chip": chip,
        "kernel": problem.name,
        "compile_s": round(seconds, 2),
        "temp_bytes": analysis.temp_size_in_bytes,
        "alias_bytes": analysis.alias_size_in_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--chip", choices=CHIPS, required=True)
    parser.add_argument("--only", nargs="*", help="names of problems; all of ours if left out")
    parser.add_argument("--dump", help="where to write the schedules of the one kernel of --only")
    arguments = parser.parse_args()
    chosen = list(problems())
    if arguments.only:
        chosen = [p for p in (*chosen, *tile_sizes(), *peers()) if p.name in arguments.only]
    if arguments.dump and len(chosen) != 1:
        parser.error("--dump needs --only with one known name")
    prepare(arguments.chip, arguments.dump, chosen[0].kernel if arguments.dump else "")
    for problem in chosen:
        print(json.dumps(compile_problem(problem, arguments.chip)), flush=True)


if __name__ == "__main__":
    main()
