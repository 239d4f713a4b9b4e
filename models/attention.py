"""What attention needs to know of a step's ragged batch.

The engine builds it, every layer reads it; the block pool itself is passed beside it because it
is donated and updated in place.
"""

import dataclasses
import functools

import jax

from jpaged.pallas_kernels.registry import Implementation


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["slot_mapping", "block_tables", "seq_lens", "query_start_loc"],
    meta_fields=["max_query_len", "implementation"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """Where the tokens of a step write their K and V, and what they may read.

    Attributes:
        slot_mapping: slot (block id x block size + offset) of each token's K and V; tokens of
            padding write into the null block.
        block_tables: the blocks of each sequence in order; unused entries are the null block.
        seq_lens: context of each sequence including this step's tokens; 0 in rows of padding.
        query_start_loc: where each sequence's tokens begin in the flat batch, and where the last
            one's end.
        max_query_len: static; the most tokens a sequence has in this step (1: decodes only), or
            None when unknown.
        implementation: static; which attention kernel to use, or None to let the device decide.
    """

    slot_mapping: jax.Array  # i32[num_tokens]
    block_tables: jax.Array  # i32[num_seqs, max_blocks_per_seq]
    seq_lens: jax.Array  # i32[num_seqs]
    query_start_loc: jax.Array  # i32[num_seqs + 1]
    max_query_len: int | None = None
    implementation: Implementation | None = None
