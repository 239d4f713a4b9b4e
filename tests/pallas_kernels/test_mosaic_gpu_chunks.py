import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import RACE, gpu_interpreter, needs_gpu_interpreter

from jpaged.pallas_kernels import paged_attention
from jpaged.pallas_kernels.paged_attention import mosaic_gpu_chunks as chunks
from jpaged.pallas_kernels.paged_attention.cases import Case, make
from jpaged.pallas_kernels.paged_attention.mosaic_gpu_chunks_kernel import (
    ITEM_FIELDS,
    Config,
    heads_per_tile,
)

# NaN in slots that no query may see goes through the products of masked rows.
pytestmark = [
    needs_gpu_interpreter,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

# Weights rounded to 11 or 8 bits, then one rounding of the output: half an ulp below 4.
TOLERANCES = {jnp.bfloat16: 3e-2, jnp.float16: 4e-3}
UNTOUCHED = 7.0

MIXED = Case(name="mixed", query_lens=(1, 1, 70, 5, 0, 2), seq_lens=(33, 130, 190, 40, 0, 150))


def _schedule(case, arrays):
    return chunks.schedule_chunks(
        arrays["seq_lens"],
        arrays["query_start_loc"],
        num_tokens=arrays["q"].shape[0],
        num_kv_heads=case.num_kv_heads,
        group_size=case.num_heads // case.num_kv_heads,
    )


def _attend(case, arrays, config=None, **interpret):
    out = jax.new_ref(jnp.full_like(arrays["q"], UNTOUCHED))
    chunks.attend_chunks(
        out,
        **arrays,
        schedule=_schedule(case, arrays),
        scale=case.scale or case.head_dim**-0.5,
        sliding_window=case.sliding_window,
        soft_cap=case.soft_cap,
        config=config,
        interpret=gpu_interpreter(**interpret),
    )
    return np.asarray(jax.freeze(out), np.float32)


def _check(case, dtype=jnp.bfloat16, config=None, **interpret):
    arrays = make(case, dtype)
    out = _attend(case, arrays, config, **interpret)
    exact = {k: v.astype(jnp.float32) if k in ("q", "pool") else v for k, v in arrays.items()}
    expected = np.array(
        paged_attention(
            **exact,
            scale=case.scale,
            sliding_window=case.sliding_window,
            soft_cap=case.soft_cap,
            implementation="reference",
        )
    )
    is_chunk = np.repeat(np.array(case.query_lens) > 1, case.query_lens)
    is_chunk = np.append(is_chunk, np.zeros(case.num_padding_tokens, bool))
    expected[~is_chunk] = UNTOUCHED
    np.testing.assert_allclose(out, expected, atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_dim": 128, "num_padding_tokens": 3, "num_padding_seqs": 2, "max_blocks": 20},
        {"head_dim": 80, "num_heads": 2},
        {"head_dim": 96},
        {"head_dim": 256},
        {"block_size": 128},
        {"block_size": 128, "head_dim": 256, "num_heads": 2},
        {"sliding_window": 21},
        {"soft_cap": 3.0, "scale": 0.5},
        {"num_heads": 7, "num_kv_heads": 1},
        {"num_heads": 8, "num_kv_heads": 1, "block_size": 32},
    ],
    ids=str,
)
def test_equals_reference(change):
    _check(dataclasses.replace(MIXED, **change))


def test_float16():
    _check(dataclasses.replace(MIXED, block_size=64), jnp.float16)


@pytest.mark.parametrize(
    "config",
    [Config(tile_kv=64, stages=3), Config(ping_pong=False)],
    ids=["small_tiles", "one_query_buffer"],
)
def test_sizes_do_not_change_results(config):
    _check(dataclasses.replace(MIXED, sliding_window=100), config=config)


def test_has_no_races(capfd):
    case = Case(name="races", query_lens=(1, 40, 3), seq_lens=(9, 150, 90), num_kv_heads=4)
    _check(case, detect_races=True)
    assert RACE not in capfd.readouterr().out


def test_a_step_without_chunks_writes_nothing():
    case = Case(name="decode", query_lens=(1, 1), seq_lens=(40, 3), num_padding_tokens=2)
    assert (_attend(case, make(case, jnp.bfloat16)) == UNTOUCHED).all()


def _items(query_lens, seq_lens, num_heads, num_kv_heads=2):
    """Columns of the scheduled items, and the heads of one."""
    schedule = chunks.schedule_chunks(
        jnp.array(seq_lens, jnp.int32),
        jnp.array(np.cumsum((0, *query_lens)), jnp.int32),
        num_tokens=sum(query_lens) + 5,
        num_kv_heads=num_kv_heads,
        group_size=num_heads // num_kv_heads,
    )
    rows = np.asarray(schedule.items).reshape(-1, len(ITEM_FIELDS))[: int(schedule.num_items[0])]
    return rows.T, heads_per_tile(num_heads // num_kv_heads)


@pytest.mark.parametrize("num_heads", [2, 8, 12, 64])
def test_schedule_covers_every_chunk_once_longest_first(num_heads):
    query_lens = np.array([1, 300, 0, 2, 640, 1, 900, 0])
    seq_lens = np.array([9, 900, 0, 5000, 640, 3, 4500, 0])
    columns, packed_heads = _items(query_lens, seq_lens, num_heads)
    token, num_tokens, position, seq, seq_len, head = columns
    covered = np.zeros((num_heads, query_lens.sum()), int)
    for first, count, first_head in zip(token, num_tokens, head, strict=True):
        covered[first_head : first_head + packed_heads, first : first + count] += 1
    is_chunk = np.repeat(query_lens > 1, query_lens)
    np.testing.assert_array_equal(covered, np.broadcast_to(is_chunk, covered.shape))
    starts = np.cumsum(query_lens) - query_lens
    np.testing.assert_array_equal(seq_len, seq_lens[seq])
    np.testing.assert_array_equal(position, (seq_lens - query_lens - starts)[seq] + token)
    context = position + num_tokens
    to_come = np.maximum.accumulate(context[::-1])[::-1]
    run_tokens = np.where(to_come > chunks.LONG_CONTEXT, chunks.LONG_RUN_TOKENS, 128)
    assert (to_come - context < run_tokens + 128).all(), "no further from sorted than a run"


def test_tiles_that_read_the_same_keys_run_together():
    (_, _, _, seq, _, head), _ = _items((512, 512), (8704, 8704), num_heads=8)
    assert len(set(zip(seq, head, strict=True))) == 4
    assert (np.diff(seq) != 0).sum() + (np.diff(head) != 0).sum() == 4, "3 heads, 1 sequence"


def test_lists_reasons_and_refuses():
    reasons = chunks.unsupported_reasons(
        num_heads=3, num_kv_heads=2, head_dim=40, block_size=8, dtype=jnp.float32
    )
    assert len(reasons) == 4
    case = Case(name="f32", query_lens=(5,), seq_lens=(9,))
    with pytest.raises(NotImplementedError, match="dtype must be bfloat16 or float16"):
        _attend(case, make(case, jnp.float32))


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="multiple of 64"):
        Config(tile_kv=96)
    with pytest.raises(ValueError, match="stages must be 2 or more"):
        Config(stages=1)
