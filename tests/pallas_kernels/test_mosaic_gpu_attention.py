"""Decodes and chunks of one batch through the GPU kernels, interpreted."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gpu_interpreter, needs_gpu_interpreter

from jpaged.pallas_kernels.paged_attention import mosaic_gpu, reference
from jpaged.pallas_kernels.paged_attention.cases import Case, make

pytestmark = [
    needs_gpu_interpreter,
    # NaN in slots that no query may see goes through the products of masked rows.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

MIXED = functools.partial(Case, query_lens=(1, 9, 1, 2, 1), seq_lens=(100, 33, 50, 4, 7))
PADDED: dict[str, Any] = {"num_padding_tokens": 3, "num_padding_seqs": 2}


@pytest.mark.parametrize(
    "case",
    [
        MIXED(name="mixed", num_heads=32, num_kv_heads=8, head_dim=128, **PADDED),
        # 7 query heads a kv head do not fill whole tiles.
        MIXED(name="filled_up", num_heads=14, num_kv_heads=2, **PADDED),
        MIXED(name="window", sliding_window=20),
        Case(name="only_chunks", query_lens=(20, 5), seq_lens=(20, 40), **PADDED),
        Case(name="only_decodes", query_lens=(1, 1), seq_lens=(20, 40), **PADDED),
    ],
    ids=lambda case: case.name,
)
def test_equals_the_reference(case):
    arrays = make(case, jnp.bfloat16)
    q, pool = arrays["q"], arrays["pool"]
    options = {"scale": case.head_dim**-0.5, "sliding_window": case.sliding_window}
    schedule = mosaic_gpu.make_schedule(
        arrays["block_tables"],
        arrays["seq_lens"],
        arrays["query_start_loc"],
        num_tokens=q.shape[0],
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        block_size=case.block_size,
        dtype=q.dtype,
        sliding_window=case.sliding_window,
        max_query_len=None,
        num_programs=3,
        merge_inside=False,
    )
    out = mosaic_gpu.paged_attention(
        **arrays, **options, schedule=schedule, interpret=gpu_interpreter()
    )
    exact = {**arrays, "q": q.astype(jnp.float32), "pool": pool.astype(jnp.float32)}
    expected = np.asarray(reference.paged_attention(**exact, **options))
    out = np.asarray(out, np.float32)
    # Rounded weights, partial results and output.
    assert np.linalg.norm(out - expected) < 4e-3 * np.linalg.norm(expected)
    num_real = sum(case.query_lens)
    assert not out[num_real:].any(), "rows of padding must be zero"
