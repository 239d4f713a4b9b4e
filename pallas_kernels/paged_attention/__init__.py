"""Attention of a ragged batch over the blocks of the pool."""

from jpaged.pallas_kernels.paged_attention.api import paged_attention as paged_attention
