"""Named problems that tests and benchmarks share, and how their arrays are made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.pallas_kernels.kv_cache_layout import NULL_BLOCK, KVCacheSpec, Layout


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A ragged batch: query and context length of each sequence, and the model's shape."""

    name: str
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    max_blocks: int | None = None
    num_padding_tokens: int = 0
    num_padding_seqs: int = 0
    sliding_window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None


CASES = (
    Case(name="one_token", query_lens=(1,), seq_lens=(1,)),
    Case(name="decode", query_lens=(1,) * 5, seq_lens=(1, 15, 16, 17, 300)),
    Case(name="prefill", query_lens=(40,), seq_lens=(40,)),
    Case(name="chunk", query_lens=(33,), seq_lens=(170,)),
    Case(name="mixed", query_lens=(1, 1, 70, 5, 2), seq_lens=(33, 130, 70, 40, 150)),
    Case(name="any_order", query_lens=(7, 1, 20, 1), seq_lens=(7, 64, 90, 2)),
    Case(name="block_edges", query_lens=(16, 17, 1, 1), seq_lens=(16, 17, 32, 33)),
    Case(
        name="padded",
        query_lens=(1, 6),
        seq_lens=(20, 6),
        num_padding_tokens=9,
        num_padding_seqs=3,
        max_blocks=40,
    ),
    Case(name="empty_rows", query_lens=(1, 0, 5, 0), seq_lens=(20, 0, 9, 0)),
    Case(name="forked_rows", query_lens=(1, 20, 0, 0, 1, 0), seq_lens=(20, 33, 33, 33, 5, 5)),
    Case(name="mha", query_lens=(1, 9), seq_lens=(50, 60), num_heads=4, num_kv_heads=4),
    Case(name="mqa", query_lens=(1, 9), seq_lens=(50, 60), num_heads=5, num_kv_heads=1),
    Case(name="window", query_lens=(1, 40, 1), seq_lens=(300, 290, 10), sliding_window=21),
    Case(name="soft_cap", query_lens=(1, 20), seq_lens=(90, 40), soft_cap=3.0),
    Case(name="scale", query_lens=(1, 20), seq_lens=(90, 40), scale=0.5),
)


def make(
    case: Case,
    dtype: jax.typing.DTypeLike,
    seed: int = 0,
    layout: Layout = "split",
    pool_dtype: jax.typing.DTypeLike | None = None,
) -> dict[str, Any]:
    """Arguments of `paged_attention` for a case.

    Physical blocks are permuted; blocks that no sequence owns, the null block among them, and the
    slots past a sequence's end are NaN, so that whoever reads them shows it. An int8 pool
    has elements of about 30, and 127 for NaN.
    """
    rng = np.random.default_rng(seed)
    block_size = case.block_size
    blocks_of = [-(-length // block_size) for length in case.seq_lens]
    num_blocks = sum(blocks_of) + 3
    max_blocks = case.max_blocks or max(*blocks_of, 1)
    spec = KVCacheSpec(
        block_size=block_size,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=jnp.dtype(dtype),
    )
    pool = np.full(spec.shape(num_blocks), np.nan, np.float32)
    num_seqs = len(case.seq_lens) + case.num_padding_seqs
    tables = np.full((num_seqs, max_blocks), NULL_BLOCK, np.int32)
    ids = iter(rng.permutation(np.arange(1, num_blocks)))
    for seq, length in enumerate(case.seq_lens):
        for block in range(blocks_of[seq]):
            tables[seq, block] = block_id = next(ids)
            filled = min(length - block * block_size, block_size)
            shape = (2, case.num_kv_heads, filled, case.head_dim)
            pool[block_id, :, :, :filled] = rng.standard_normal(shape)
    if layout == "merged":
        pool = np.concatenate(np.split(pool, 2, axis=1), axis=-1)
    pool_dtype = jnp.dtype(dtype if pool_dtype is None else pool_dtype)
    if pool_dtype == jnp.int8:
        pool = np.nan_to_num(np.rint(30 * pool).clip(-126, 126), nan=127)
    num_tokens = sum(case.query_lens) + case.num_padding_tokens
    q = rng.standard_normal((num_tokens, case.num_heads, case.head_dim))
    lens = np.zeros(num_seqs, np.int32)
    lens[: len(case.seq_lens)] = case.seq_lens
    starts = np.full(num_seqs + 1, sum(case.query_lens), np.int32)
    starts[: len(case.query_lens) + 1] = np.cumsum((0, *case.query_lens))
    return {
        "q": jnp.asarray(q, dtype),
        "pool": jnp.asarray(pool, pool_dtype),
        "block_tables": jnp.asarray(tables),
        "seq_lens": jnp.asarray(lens),
        "query_start_loc": jnp.asarray(starts),
    }
