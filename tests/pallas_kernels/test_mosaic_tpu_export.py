"""Programs with TPU kernels, lowered for a TPU, written and read back; without a TPU or libtpu."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jpaged.compile_plan import StepShape
from jpaged.models.causal_lm import CausalLM
from jpaged.models.config import ModelConfig
from jpaged.pallas_kernels import (
    KVCacheSpec,
    copy_blocks_mosaic_tpu,
    preferred_layout,
    rope_mosaic_tpu,
    set_target_platform,
    write_kv_mosaic_tpu,
)
from jpaged.pallas_kernels.paged_attention import mosaic_tpu
from jpaged.plan.shapes import SHAPES
from jpaged.step import StepFunction

ATTENTION = functools.partial(mosaic_tpu.paged_attention, scale=0.1)
DECODE, CHUNKS = "jpaged_attention_decode", "jpaged_attention_chunks"
WRITE = ("jpaged_rope", "jpaged_write_kv")
NUM_BLOCKS, NUM_LAYERS = 64, 2


def _bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


POOL = _bf16(NUM_BLOCKS, 2, 2, 16, 128)


def _kernels(text):
    return set(re.findall(r'kernel_name = "(\w+)"', text))


def _check(function, arguments, names):
    """Exports a function, and imports it into another program."""
    exported = export.export(jax.jit(function), platforms=["tpu"])(*arguments)
    read = export.deserialize(exported.serialize())
    assert read.platforms == ("tpu",)
    assert read.in_avals == exported.in_avals
    assert read.out_avals == exported.out_avals
    assert _kernels(read.mlir_module()) == names
    imported = jax.jit(read.call).trace(*arguments).lower(lowering_platforms=("tpu",))
    assert _kernels(imported.as_text()) == names


@pytest.mark.parametrize(
    ("function", "arguments", "names"),
    [
        (
            functools.partial(ATTENTION, max_query_len=1),
            (_bf16(8, 4, 128), POOL, _i32(8, 16), _i32(8), _i32(9)),
            {DECODE},
        ),
        (ATTENTION, (_bf16(64, 4, 128), POOL, _i32(8, 16), _i32(8), _i32(9)), {DECODE, CHUNKS}),
        (
            write_kv_mosaic_tpu.write_kv,
            (POOL, _bf16(8, 2, 128), _bf16(8, 2, 128), _i32(8)),
            {"jpaged_write_kv"},
        ),
        (
            functools.partial(rope_mosaic_tpu.rotate_heads, num_heads=4, num_kv_heads=2),
            (_bf16(8, 8 * 128), *(jax.ShapeDtypeStruct((8, 64), jnp.float32),) * 2),
            {"jpaged_rope"},
        ),
        (copy_blocks_mosaic_tpu.copy_blocks, (POOL, _i32(4), _i32(4)), {"jpaged_copy_blocks"}),
    ],
    ids=["decode", "mixed", "write_kv", "rope", "copy_blocks"],
)
def test_kernels_are_exported(function, arguments, names):
    _check(function, arguments, names)


@pytest.fixture
def for_tpu():
    """Kernels are chosen for TPUs, and nothing traced so is left behind."""
    set_target_platform("tpu")
    yield
    set_target_platform(None)
    jax.clear_caches()


def _step():
    config = ModelConfig.from_hf({**SHAPES["tiny"], "head_dim": 128})
    model = CausalLM(config, dtype=jnp.bfloat16)
    spec = KVCacheSpec(
        block_size=16,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=jnp.dtype(jnp.bfloat16),
        layout=preferred_layout(config.head_dim),
    )
    return StepFunction(model, spec, num_rows=8, max_blocks_per_seq=16, max_logprobs=2)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (StepShape(8, 8, True, plain=True), {DECODE, *WRITE}),
        (StepShape(64, 8, False), {DECODE, CHUNKS, *WRITE, "jpaged_copy_blocks"}),
    ],
    ids=["decode_plain", "mixed"],
)
def test_steps_run_the_kernels_and_update_the_pools_in_place(for_tpu, shape, names):
    text = _step().lower(shape, NUM_BLOCKS, platform="tpu").as_text()
    assert _kernels(text) == names
    [entry] = [line for line in text.splitlines() if "func.func public @main" in line]
    pool = f"tensor<{NUM_BLOCKS}x2x2x16x128xbf16>"
    arguments, results = entry.split(" -> ")
    in_place = [part for part in arguments.split("%arg") if pool in part]
    assert len(in_place) == results.count(pool) == NUM_LAYERS
    assert all("tf.aliasing_output" in part for part in in_place)


def test_a_step_is_exported(for_tpu):
    jitted, arguments = _step().jitted(StepShape(8, 8, True, plain=True), NUM_BLOCKS)
    leaves, tree = jax.tree.flatten(arguments)
    _check(
        # The sampler's state is a class of ours, which other programs need not know.
        lambda *leaves: jax.tree.leaves(jitted(*jax.tree.unflatten(tree, leaves))),
        leaves,
        {DECODE, *WRITE},
    )
