"""The decode kernel and its merge: in JAX's GPU interpreter on any machine, compiled on a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import RACE, gpu_interpreter, needs_gpu_interpreter

from jpaged.pallas_kernels import mosaic_gpu as device
from jpaged.pallas_kernels import paged_attention
from jpaged.pallas_kernels.paged_attention import (
    mosaic_gpu_combine,
    mosaic_gpu_decode,
    mosaic_gpu_decode_schedule,
    reference,
)
from jpaged.pallas_kernels.paged_attention.cases import Case, make

# Rounded weights of up to 300 slots, a rounded partial result and a rounded output.
RELATIVE_ERROR = {jnp.bfloat16: 4e-3, jnp.float16: 6e-4}

DECODES = functools.partial(Case, head_dim=128, num_heads=32, num_kv_heads=8)
LONE = DECODES(name="lone", query_lens=(1,), seq_lens=(300,))
CASES = (
    DECODES(
        name="ragged_and_padded",
        query_lens=(1,) * 5,
        seq_lens=(100, 33, 1, 90, 257),
        num_padding_seqs=2,
        num_padding_tokens=2,
    ),
    DECODES(name="gaps", query_lens=(0, 1, 0, 0, 1, 0), seq_lens=(0, 50, 0, 0, 33, 0)),
    LONE,
    DECODES(name="window", query_lens=(1,) * 3, seq_lens=(100, 33, 1), sliding_window=40),
    DECODES(name="soft_cap", query_lens=(1,) * 3, seq_lens=(100, 33, 1), soft_cap=2.0, scale=0.3),
    DECODES(name="block_64", query_lens=(1,) * 3, seq_lens=(100, 33, 1), block_size=64),
    DECODES(
        name="block_32_kv_4",
        query_lens=(1,) * 3,
        seq_lens=(100, 33, 1),
        num_heads=16,
        num_kv_heads=4,
        block_size=32,
    ),
    DECODES(
        name="block_128_kv_2",
        query_lens=(1,) * 3,
        seq_lens=(100, 133, 1),
        num_heads=14,
        num_kv_heads=2,
        block_size=128,
    ),
    DECODES(name="mha", query_lens=(1,) * 2, seq_lens=(40, 33), num_heads=16, num_kv_heads=16),
    DECODES(name="group_32", query_lens=(1,), seq_lens=(99,), num_heads=64, num_kv_heads=2),
    DECODES(name="mqa_64", query_lens=(1,) * 3, seq_lens=(99, 33, 1), num_kv_heads=1, head_dim=64),
    DECODES(
        name="kv_3_64",
        query_lens=(1,) * 3,
        seq_lens=(100, 133, 1),
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
    ),
    DECODES(name="d_80", query_lens=(1,) * 3, seq_lens=(99, 33, 1), num_heads=8, head_dim=80),
    DECODES(name="d_96", query_lens=(1,) * 3, seq_lens=(99, 33, 1), num_heads=8, head_dim=96),
    DECODES(name="d_256", query_lens=(1,) * 3, seq_lens=(99, 33, 1), num_heads=16, head_dim=256),
)
MIXED = DECODES(name="mixed", query_lens=(1, 7, 1, 2, 1), seq_lens=(100, 33, 50, 4, 7))


def _attend(
    arrays,
    case,
    *,
    num_programs,
    interpret=None,
    into=None,
    as_one_of_many=False,
    **combine_options,
):
    q, pool, tables = arrays["q"], arrays["pool"], arrays["block_tables"]
    geometry = mosaic_gpu_decode_schedule.choose_geometry(
        q.shape[1],
        pool.shape[2],
        q.shape[2],
        pool.shape[3],
        q.dtype,
        num_seqs=1 << 20 if as_one_of_many else tables.shape[0],
    )
    schedule = mosaic_gpu_decode_schedule.make_schedule(
        tables,
        arrays["seq_lens"],
        arrays["query_start_loc"],
        geometry,
        sliding_window=case.sliding_window,
        num_programs=num_programs,
        merge_inside=None if interpret is None else False,
    )
    tiles = geometry.num_kv_heads // geometry.heads
    rows = (q.shape[0], tiles, geometry.stored_rows, q.shape[2])
    ref = None if into is None else jax.new_ref(into.reshape(rows))
    out, partial, stats = mosaic_gpu_decode.attend_decodes(
        q,
        pool,
        tables,
        schedule,
        scale=case.scale or case.head_dim**-0.5,
        sliding_window=case.sliding_window,
        soft_cap=case.soft_cap,
        out_ref=ref,
        interpret=interpret,
    )
    out = jax.freeze(ref) if ref is not None else out
    assert out is not None
    if schedule.merges is not None:
        ref = jax.new_ref(out.reshape(q.shape[0], geometry.head_groups, -1))
        mosaic_gpu_combine.combine(
            ref, partial, stats, schedule, interpret=interpret, **combine_options
        )
        out = jax.freeze(ref)
    return out.reshape(rows)[:, :, : geometry.query_rows].reshape(q.shape)


def _expected(arrays, case):
    exact = {k: v.astype(jnp.float32) if k in ("q", "pool") else v for k, v in arrays.items()}
    return np.asarray(
        reference.paged_attention(
            **exact,
            scale=case.scale or case.head_dim**-0.5,
            sliding_window=case.sliding_window,
            soft_cap=case.soft_cap,
        )
    )


def _assert_close(out, expected, dtype):
    out = np.asarray(out, np.float32)
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert error < RELATIVE_ERROR[dtype], error


@needs_gpu_interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_reference_when_interpreted(case):
    arrays = make(case, jnp.bfloat16)
    out = _attend(arrays, case, num_programs=3, interpret=gpu_interpreter())
    _assert_close(out, _expected(arrays, case), jnp.bfloat16)
    num_padded = case.num_padding_tokens
    assert num_padded == 0 or not np.asarray(out[-num_padded:], np.float32).any()


@needs_gpu_interpreter
@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.name)
def test_heads_go_together_in_large_batches(case):
    arrays = make(case, jnp.bfloat16)
    out = _attend(arrays, case, num_programs=3, interpret=gpu_interpreter(), as_one_of_many=True)
    _assert_close(out, _expected(arrays, case), jnp.bfloat16)


@needs_gpu_interpreter
@pytest.mark.parametrize("num_programs", [1, 8])
def test_however_the_context_is_cut(num_programs):
    arrays = make(CASES[0], jnp.float16)
    out = _attend(arrays, CASES[0], num_programs=num_programs, interpret=gpu_interpreter())
    _assert_close(out, _expected(arrays, CASES[0]), jnp.float16)


@needs_gpu_interpreter
def test_no_two_warpgroups_race(capfd):
    arrays = make(LONE, jnp.bfloat16)
    out = _attend(
        arrays,
        LONE,
        num_programs=4,
        interpret=gpu_interpreter(detect_races=True),
        unroll=2,
        warpgroups=2,
    )
    _assert_close(out, _expected(arrays, LONE), jnp.bfloat16)
    assert RACE not in capfd.readouterr().out


@needs_gpu_interpreter
def test_rows_of_chunks_are_left_alone():
    arrays = make(MIXED, jnp.bfloat16)
    into = jnp.zeros_like(arrays["q"])
    out = _attend(arrays, MIXED, num_programs=3, interpret=gpu_interpreter(), into=into)
    starts = np.asarray(arrays["query_start_loc"])
    decodes = [starts[i] for i, length in enumerate(MIXED.query_lens) if length == 1]
    _assert_close(out[np.array(decodes)], _expected(arrays, MIXED)[decodes], jnp.bfloat16)
    others = np.setdiff1d(np.arange(out.shape[0]), decodes)
    assert not np.asarray(out[others], np.float32).any()


@needs_gpu_interpreter
@pytest.mark.parametrize(
    ("num_seqs", "num_heads", "num_kv_heads", "head_dim", "block_size", "num_kernels"),
    [
        (1, 32, 8, 128, 16, 1),
        (256, 32, 8, 128, 16, 1),
        (64, 32, 8, 128, 128, 1),
        (64, 40, 40, 128, 16, 1),
        (64, 28, 4, 128, 16, 1),
        (64, 16, 8, 256, 32, 1),
        (8, 32, 32, 80, 16, 1),
        (8, 32, 32, 96, 64, 1),
        (8, 9, 3, 64, 16, 1),
        (8, 128, 8, 128, 16, 1),
        (1, 8, 2, 128, 16, 2),  # 132 programs share what one sequence has of two heads
    ],
)
def test_lowers_for_a_gpu(num_seqs, num_heads, num_kv_heads, head_dim, block_size, num_kernels):
    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    arrays = {
        "q": jax.ShapeDtypeStruct((num_seqs, num_heads, head_dim), jnp.bfloat16),
        "pool": jax.ShapeDtypeStruct((20_000, 2, num_kv_heads, block_size, head_dim), jnp.bfloat16),
        "block_tables": ints(num_seqs, 512),
        "seq_lens": ints(num_seqs),
        "query_start_loc": ints(num_seqs + 1),
    }
    case = Case(name="large", query_lens=(), seq_lens=(), head_dim=head_dim)
    attend = jax.jit(lambda arrays: _attend(arrays, case, num_programs=132))
    text = attend.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == num_kernels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "dtype must be bfloat16 or float16"),
        ({"head_dim": 72}, "head_dim must be 64, 80, 96, 128 or 256, got 72"),
        ({"block_size": 8}, "block_size must be at least 16, got 8"),
        ({"num_heads": 128, "num_kv_heads": 1}, "a tile of 64 rows must hold .* got 128"),
    ],
)
def test_says_what_it_cannot_serve(change, message):
    problem = {
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "block_size": 16,
        "dtype": jnp.bfloat16,
    }
    assert not mosaic_gpu_decode_schedule.unsupported_reasons(**problem)
    (reason,) = mosaic_gpu_decode_schedule.unsupported_reasons(**{**problem, **change})
    assert re.search(message, reason)


@pytest.mark.skipif(not device.device_reasons(), reason="this device runs the kernels")
def test_is_refused_by_name_where_it_cannot_run():
    arrays = make(Case(name="d", query_lens=(1,), seq_lens=(5,)), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="mosaic_gpu cannot run here: the device is a"):
        paged_attention(**arrays, implementation="mosaic_gpu")


# On a GPU, through the public function.

GPU_CASES = (
    *CASES,
    MIXED,
    DECODES(name="long_and_short", query_lens=(1,) * 4, seq_lens=(9000, 15, 16, 17)),
    DECODES(name="many", query_lens=(1,) * 300, seq_lens=tuple(range(1, 601, 2))),
    DECODES(
        name="chunks_and_decodes",
        query_lens=(1, 1, 70, 5, 300, 1),
        seq_lens=(33, 1300, 70, 400, 1500, 7),
        num_padding_tokens=5,
        num_padding_seqs=3,
    ),
)


@pytest.mark.gpu
@pytest.mark.skipif(bool(device.device_reasons()), reason="needs a GPU that runs Mosaic kernels")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_equals_the_reference_on_a_gpu(case, dtype):
    arrays = make(case, dtype)
    attend = functools.partial(
        paged_attention,
        scale=case.scale,
        sliding_window=case.sliding_window,
        soft_cap=case.soft_cap,
        max_query_len=1 if max(case.query_lens) == 1 else None,
        implementation="mosaic_gpu",
    )
    _assert_close(jax.jit(attend)(**arrays), _expected(arrays, case), dtype)
