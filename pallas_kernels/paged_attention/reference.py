"""What paged attention means, written to be obviously right: gather, mask, softmax, einsum."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jpaged.pallas_kernels.kv_cache_layout import (
    KVCacheSpec,
    Pool,
    Scale,
    per_head,
    split_blocks,
)


def paged_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    pool: Pool,
    block_tables: Int32[Array, "num_seqs max_blocks"],
    seq_lens: Int32[Array, " num_seqs"],
    query_start_loc: Int32[Array, " num_seqs_plus_1"],
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    max_query_len: int | None = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """See `jpaged.pallas_kernels.paged_attention`. Gathers whole contexts: for tests only."""
    del max_query_len  # a hint for speed
    num_tokens, num_heads, head_dim = q.shape
    spec = KVCacheSpec.of(pool)
    num_kv_heads, block_size = spec.num_kv_heads, spec.block_size
    num_seqs, max_blocks = block_tables.shape
    token = jnp.arange(num_tokens)
    seq = jnp.searchsorted(query_start_loc, token, side="right") - 1  # [T]
    is_real = token < query_start_loc[-1]
    seq = jnp.where(is_real, seq, 0)
    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    position = seq_lens[seq] - query_lens[seq] + token - query_start_loc[seq]

    kv = split_blocks(pool[block_tables]).astype(jnp.float32)  # [S, B, 2, K, block_size, D]
    scales = jnp.stack([per_head(k_scale, num_kv_heads), per_head(v_scale, num_kv_heads)])
    kv *= scales[:, :, None, None]
    kv = jnp.moveaxis(kv, 4, 2).reshape(
        num_seqs, max_blocks * block_size, 2, num_kv_heads, head_dim
    )
    context = jnp.arange(max_blocks * block_size)
    visible = (context <= position[:, None]) & is_real[:, None]  # [T, C]
    if sliding_window is not None:
        visible &= context > position[:, None] - sliding_window
    # Slots that no query may see can hold anything, NaN included: 0 x NaN would still be NaN.
    in_context = context < seq_lens[:, None]  # [S, C]
    kv = jnp.where(in_context[:, :, None, None, None], kv, 0.0)

    grouped = q.astype(jnp.float32).reshape(num_tokens, num_kv_heads, -1, head_dim)
    logits = jnp.einsum("tkgd,tckd->tkgc", grouped, kv[seq, :, 0], precision="highest") * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(visible[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("tkgc,tckd->tkgd", weights, kv[seq, :, 1], precision="highest")
    out = jnp.where(is_real[:, None, None, None], out, 0.0)
    return out.reshape(num_tokens, num_heads, head_dim).astype(q.dtype)
