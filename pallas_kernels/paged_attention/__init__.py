"""Attention of a ragged batch over the blocks of the pool."""

from jpaged.pallas_kernels.paged_attention.api import Schedule as Schedule
from jpaged.pallas_kernels.paged_attention.api import choose_implementation as choose_implementation
from jpaged.pallas_kernels.paged_attention.api import make_schedule as make_schedule
from jpaged.pallas_kernels.paged_attention.api import paged_attention as paged_attention
