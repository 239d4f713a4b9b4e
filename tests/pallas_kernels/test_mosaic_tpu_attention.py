"""The TPU kernel, interpreted with the race detector."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_no_races, tpu_interpreter

from jpaged.pallas_kernels import KVCacheSpec, paged_attention
from jpaged.pallas_kernels.paged_attention import mosaic_tpu, reference
from jpaged.pallas_kernels.paged_attention.cases import CASES, Case, make

pytestmark = pytest.mark.usefixtures("quick_compilation")

# As test_paged_attention.py: sums in another order; rounded weights and outputs.
TOLERANCES = {jnp.float32: 2e-5, jnp.bfloat16: 3e-2}
# Tiles of 32 tokens, so that contexts take several of them.
TILE_TOKENS = 32
# The fewest rows of a chunk's tile that always lie along lanes.
CHUNK_ROWS = 256


def _run(case, dtype, *, chunk_rows=CHUNK_ROWS, tile_tokens=TILE_TOKENS, **options):
    # The layouts that a pool has on a TPU.
    arrays = make(case, dtype, layout="merged" if case.head_dim == 64 else "split")
    options |= {
        "scale": case.scale or case.head_dim**-0.5,
        "sliding_window": case.sliding_window,
        "soft_cap": case.soft_cap,
    }
    exact = {k: x.astype(jnp.float32) if k in ("q", "pool") else x for k, x in arrays.items()}
    expected = reference.paged_attention(**exact, **options)
    token_bytes = KVCacheSpec.of(arrays["pool"]).block_bytes // case.block_size
    out = mosaic_tpu.paged_attention(
        **arrays,
        **options,
        sizes=mosaic_tpu.TileSizes(
            kv_bytes=max(tile_tokens, case.block_size) * token_bytes, chunk_rows=chunk_rows
        ),
        interpret=tpu_interpreter(),
    )
    assert_no_races()
    assert out.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float32), expected, atol=TOLERANCES[dtype], rtol=0
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_reference(case):
    _run(case, jnp.float32)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(32, 8, 128, 16), (9, 3, 64, 16), (4, 2, 256, 64), (6, 6, 128, 128), (16, 1, 128, 16)],
)
def test_shapes_of_models_in_bfloat16(num_heads, num_kv_heads, head_dim, block_size):
    case = Case(
        name="shape",
        query_lens=(1, 9, 1),
        seq_lens=(block_size + 1, 40, 70),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
    )
    _run(case, jnp.bfloat16)


def test_decodes_only():
    decodes = Case(name="d", query_lens=(1,) * 4, seq_lens=(1, 32, 33, 100), head_dim=128)
    _run(decodes, jnp.float32)
    _run(decodes, jnp.float32, max_query_len=1)


def test_chunks_of_few_queries():
    case = Case(name="few", query_lens=(9, 1, 3), seq_lens=(50, 40, 3))
    _run(case, jnp.float32, max_query_len=9)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_tiles_that_need_no_mask_and_others_in_a_window(num_kv_heads):
    # Of tile_q 256 and tiles of 32 tokens: 64 to 351 are out of the window or partly, 352 to 383
    # are visible to all queries, what follows is not.
    case = Case(
        name="window",
        query_lens=(5, 3),
        seq_lens=(400, 30),
        num_heads=2 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        sliding_window=330,
        soft_cap=4.0,
    )
    _run(case, jnp.float32, chunk_rows=512)


@pytest.mark.parametrize("sliding_window", [None, 600])
def test_tiles_as_long_as_those_of_models(sliding_window):
    # Two products with V a tile, and masks made in several iterations.
    case = Case(
        name="long",
        query_lens=(20,),
        seq_lens=(1200,),
        head_dim=128,
        block_size=64,
        sliding_window=sliding_window,
    )
    _run(case, jnp.bfloat16, tile_tokens=512)


def test_nothing_to_do():
    arrays = make(Case(name="none", query_lens=(0,), seq_lens=(0,), num_padding_tokens=3), "f4")
    out = mosaic_tpu.paged_attention(**arrays, scale=1.0, interpret=tpu_interpreter())
    assert not np.asarray(out).any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 80}, r"needs head_dim in \(128, 256\), .* got 80 in the split layout"),
        ({"head_dim": 64}, r"half of one in the merged layout, got 64 in the split layout"),
        ({"layout": "merged", "head_dim": 80}, "got 80 in the merged layout"),
        ({"layout": "merged", "head_dim": 128, "num_heads": 520}, "up to 128 query heads, got 520"),
        (
            {"dtype": jnp.dtype(jnp.float16)},
            "needs bfloat16, float32, int8 or float8_e4m3fn, got float16",
        ),
        ({"block_size": 8}, "needs blocks of a multiple of 16 tokens, got 8"),
        ({"num_heads": 1040}, "takes up to 256 query heads, got 1040"),
        ({"num_kv_heads": 40, "num_heads": 40, "head_dim": 256, "block_size": 128}, "blocks of up"),
    ],
)
def test_reasons_against_a_problem(change, reason):
    problem = {
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "block_size": 16,
        "dtype": jnp.dtype(jnp.bfloat16),
    }

    def reasons(*, num_heads, **spec):
        return mosaic_tpu.unsupported_reasons(num_heads, KVCacheSpec(**spec))

    assert not reasons(**problem)
    assert not reasons(**{**problem, "head_dim": 64, "layout": "merged"})
    (found,) = reasons(**{**problem, **change})
    assert re.search(reason, found)


def test_asked_for_where_it_cannot_run():
    arrays = make(Case(name="v", query_lens=(1,), seq_lens=(9,)), jnp.float32)
    with pytest.raises(NotImplementedError, match=r"mosaic_tpu cannot run here: .*not a TPU"):
        paged_attention(**arrays, implementation="mosaic_tpu")
