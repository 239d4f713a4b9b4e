"""Kernels over the KV block pool, and what a decode step needs around them. Imports only jax."""

from jpaged.pallas_kernels.add_rms_norm import add_rms_norm as add_rms_norm
from jpaged.pallas_kernels.add_rms_norm import rms_norm as rms_norm
from jpaged.pallas_kernels.copy_blocks import copy_blocks as copy_blocks
from jpaged.pallas_kernels.kv_cache_layout import KVCacheSpec as KVCacheSpec
from jpaged.pallas_kernels.linear import linear as linear
from jpaged.pallas_kernels.linear import num_splits as num_splits
from jpaged.pallas_kernels.mosaic_tpu import preferred_layout as preferred_layout
from jpaged.pallas_kernels.paged_attention import paged_attention as paged_attention
from jpaged.pallas_kernels.rope_write_kv import rope_write_kv as rope_write_kv
from jpaged.pallas_kernels.rope_write_kv import rotate as rotate
from jpaged.pallas_kernels.target import set_target_platform as set_target_platform
from jpaged.pallas_kernels.write_kv import write_kv as write_kv

__all__ = [
    "KVCacheSpec",
    "add_rms_norm",
    "copy_blocks",
    "linear",
    "num_splits",
    "paged_attention",
    "preferred_layout",
    "rms_norm",
    "rope_write_kv",
    "rotate",
    "set_target_platform",
    "write_kv",
]
