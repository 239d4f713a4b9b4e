"""The blocks of the host pool: the same bookkeeping as the device's, for what was swapped out.

Ids only; `block_swapper` holds the K and V. A host block is used while a swapped-out sequence, or a
copy that is under way, refers to it. Where the pool is a tier of the prefix cache, a block of known
content stays findable when its last reference goes, until it is handed out again, least recently
used first; otherwise it is simply empty then.
"""

from jpaged.block_pool import BlockPool


class HostBlockPool(BlockPool):
    """Hands out ids of host blocks; id 0 is never handed out, as on the device.

    Attributes:
        keeps_content: whether unused blocks stay findable by their content.
    """

    def __init__(self, num_blocks: int, block_size: int, keeps_content: bool = False) -> None:
        """Makes a pool of `num_blocks` free blocks.

        Raises:
            ValueError: if there is not a single block, or the block size is not positive.
        """
        if num_blocks < 1:
            raise ValueError(f"num_blocks of the host pool must be at least 1, got {num_blocks}")
        super().__init__(num_blocks + 1, block_size)
        self.keeps_content = keeps_content

    def free(self, block_ids: list[int]) -> list[int]:
        """Drops a reference of each block; returns the ids that became free."""
        freed = super().free(block_ids)
        if not self.keeps_content:
            for block_id in freed:
                block = self.blocks[block_id]
                if block.block_hash is not None:
                    del self.cached[block.block_hash]
                    block.block_hash = None
        return freed

    def refresh(self, block_id: int) -> None:
        """Makes an unused block the one to be handed out last; a used one is left alone."""
        if self.blocks[block_id].ref_count == 0:
            self.touch([block_id])
            self.free([block_id])
