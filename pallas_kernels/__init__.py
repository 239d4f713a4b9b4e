"""Kernels over the KV block pool: attention, KV write, block copy. Imports only jax."""

from jpaged.pallas_kernels.copy_blocks import copy_blocks as copy_blocks
from jpaged.pallas_kernels.kv_cache_layout import KVCacheSpec as KVCacheSpec
from jpaged.pallas_kernels.paged_attention import paged_attention as paged_attention
from jpaged.pallas_kernels.write_kv import write_kv as write_kv

__all__ = ["KVCacheSpec", "copy_blocks", "paged_attention", "write_kv"]
