"""The PagedAttention paper's figures, from this repository's scheduler and block manager."""
