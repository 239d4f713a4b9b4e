"""The prefix cache: chained hashes of full blocks, their lookup and their registration.

A block's hash is a SHA-256 of its parent's hash and its own token ids, so equal hashes mean equal
tokens from the first on. The chain starts from the request's `cache_salt`: requests of different
salts never share a block. Hashes are computed once for a full block of a sequence and kept on it.

A block may be registered as soon as a step that completes it has been scheduled and its token ids
are known, before the device has run: steps run in order and each layer writes K and V before it
attends, so whoever hits the block, even in the same step, reads finished content. The caller must
therefore execute every step it schedules.

A step in flight may still write one slot of a sequence that the host has meanwhile finished or
preempted. That slot's block is either unregistered, as its tokens are not all known, or registered
for exactly the token that the step writes there: the slot at position p is written from token p,
and `register` only counts tokens that are both known and scheduled. So such a write never changes
what a registered block stands for, and blocks reused later are overwritten by later steps only.
"""

import array
import hashlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jpaged.block_pool import BlockPool
    from jpaged.request import Sequence


def root_hash(cache_salt: str | None) -> bytes:
    """The parent of a first block; differs for every salt, and from that of no salt."""
    text = b"jpaged" if cache_salt is None else b"jpaged:" + cache_salt.encode()
    return hashlib.sha256(text).digest()


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """The hash of a full block that follows the one of hash `parent`."""
    return hashlib.sha256(parent + array.array("i", token_ids).tobytes()).digest()


class PrefixCache:
    """Finds and registers full blocks by content.

    Attributes:
        num_queried_tokens: tokens of the sequences that were looked up on their first admission.
        num_hit_tokens: how many of those were found.
    """

    def __init__(self, pool: "BlockPool", enabled: bool) -> None:
        self.enabled = enabled
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._pool = pool
        self._block_size = pool.block_size

    def lookup(self, seq: "Sequence") -> list[int]:
        """Ids of the longest run of cached blocks from the sequence's first token.

        At least one token is always left to compute, since a step needs one to sample the next
        from: of a fully cached prompt the last block is computed again.
        """
        ids: list[int] = []
        cached = self._pool.cached
        for block_hash in self.hashes_to_look_up(seq):
            block_id = cached.get(block_hash)
            if block_id is None:
                break
            ids.append(block_id)
        return ids

    def hashes_to_look_up(self, seq: "Sequence") -> "Iterator[bytes]":
        """Hashes of the blocks that a sequence without blocks may start from, as they are asked."""
        if not self.enabled or (seq.request.skip_prefix_cache and seq.seq_index == 0):
            return
        hashes = seq.block_hashes
        for index in range((len(seq.token_ids) - 1) // self._block_size):
            if index == len(hashes):
                self._extend_hashes(seq)
            yield hashes[index]

    def register(self, seq: "Sequence") -> None:
        """Registers the sequence's blocks whose tokens are all known and scheduled."""
        if not self.enabled:
            seq.register_at = sys.maxsize
            return
        full = min(len(seq.token_ids), seq.num_computed_tokens) // self._block_size
        hashes = seq.block_hashes
        for index in range(seq.num_registered_blocks, full):
            # Of blocks taken over from a sibling some may not have been looked up.
            while index >= len(hashes):
                self._extend_hashes(seq)
            self._pool.register(seq.block_ids[index], hashes[index])
        seq.num_registered_blocks = max(full, seq.num_registered_blocks)
        seq.register_at = (seq.num_registered_blocks + 1) * self._block_size

    def count(self, num_tokens: int, num_hit_tokens: int) -> None:
        """Counts one lookup that was used."""
        self.num_queried_tokens += num_tokens
        self.num_hit_tokens += num_hit_tokens

    def _extend_hashes(self, seq: "Sequence") -> None:
        hashes, size = seq.block_hashes, self._block_size
        if not hashes and seq.seq_index > 0:
            # The prompt's hashes are the same for all sequences of a group.
            first = seq.request.sequences[0].block_hashes
            hashes.extend(first[: seq.num_prompt_tokens // size])
            if hashes:
                return
        parent = hashes[-1] if hashes else root_hash(seq.request.cache_salt)
        start = len(hashes) * size
        hashes.append(hash_block(parent, seq.token_ids[start : start + size]))
