import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.pallas_kernels import paged_attention
from jpaged.pallas_kernels.paged_attention.cases import CASES, Case, make

# f32: sums of up to 300 products in another order. bf16 and f16: one rounding of the output (half
# an ulp of values below 4) on top of rounded softmax weights.
TOLERANCES = {jnp.float32: 2e-5, jnp.bfloat16: 3e-2, jnp.float16: 4e-3}


def _options(case):
    return {
        "scale": case.scale,
        "sliding_window": case.sliding_window,
        "soft_cap": case.soft_cap,
    }


def _dense(case, q, pool, block_tables):
    """Attention of each sequence on its own, in float64 NumPy, from nothing but the definition."""
    q, pool, tables = (np.asarray(x, np.float64) for x in (q, pool, block_tables))
    out = np.zeros_like(q)
    token = 0
    scale = case.scale or case.head_dim**-0.5
    for seq, (num_queries, length) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        slots = [
            pool[int(tables[seq, p // case.block_size]), :, :, p % case.block_size]
            for p in range(length)
        ]
        for i in range(num_queries):
            position = length - num_queries + i
            first = 0
            if case.sliding_window is not None:
                first = max(0, position - case.sliding_window + 1)
            kv = np.stack(slots[first : position + 1])  # [C, 2, K, D]
            for head in range(case.num_heads):
                kv_head = head * case.num_kv_heads // case.num_heads
                logits = kv[:, 0, kv_head] @ q[token, head] * scale
                if case.soft_cap is not None:
                    logits = case.soft_cap * np.tanh(logits / case.soft_cap)
                weights = np.exp(logits - logits.max())
                out[token, head] = weights @ kv[:, 1, kv_head] / weights.sum()
            token += 1
    return out


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_dense_attention(case, implementation):
    arrays = make(case, jnp.float32)
    out = paged_attention(**arrays, **_options(case), implementation=implementation)
    expected = _dense(case, arrays["q"], arrays["pool"], arrays["block_tables"])
    np.testing.assert_allclose(out, expected, atol=TOLERANCES[jnp.float32], rtol=0)


@pytest.mark.parametrize(
    ("block_size", "head_dim", "dtype"),
    [(size, 64, jnp.float32) for size in (8, 16, 32, 64, 128)]
    + [(16, dim, jnp.float32) for dim in (80, 96, 128, 256)]
    + [(8, 80, jnp.bfloat16), (16, 64, jnp.bfloat16), (128, 256, jnp.bfloat16)]
    + [(16, 128, jnp.float16), (64, 96, jnp.float16)],
)
def test_xla_equals_reference_over_the_grid(block_size, head_dim, dtype):
    case = Case(
        name="grid",
        query_lens=(1, 1, 20, 3),
        seq_lens=(129, 7, 150, 3),
        head_dim=head_dim,
        block_size=block_size,
    )
    arrays = make(case, dtype)
    out = paged_attention(**arrays, implementation="xla")
    expected = paged_attention(
        **{k: v.astype(jnp.float32) if k in "q pool" else v for k, v in arrays.items()},
        implementation="reference",
    )
    assert out.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float32), expected, atol=TOLERANCES[dtype], rtol=0
    )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["mixed", "window", "padded"])
def test_layouts_give_the_same(name, implementation):
    (case,) = (case for case in CASES if case.name == name)
    out, merged = (
        paged_attention(
            **make(case, jnp.float32, layout=layout),
            **_options(case),
            implementation=implementation,
        )
        for layout in ("split", "merged")
    )
    np.testing.assert_array_equal(out, merged)


def test_decode_hint_changes_nothing():
    arrays = make(
        Case(name="decode", query_lens=(1,) * 9, seq_lens=tuple(range(1, 90, 10))), jnp.float32
    )
    hinted = paged_attention(**arrays, max_query_len=1)
    np.testing.assert_array_equal(hinted, paged_attention(**arrays))


def test_a_row_does_not_depend_on_its_neighbours():
    case = Case(name="many", query_lens=(1,) * 6, seq_lens=(90, 200, 3, 64, 17, 130))
    arrays = make(case, jnp.float32)
    together = paged_attention(**arrays)
    for seq in range(6):
        alone = paged_attention(
            arrays["q"][seq : seq + 1],
            arrays["pool"],
            arrays["block_tables"][seq : seq + 1],
            arrays["seq_lens"][seq : seq + 1],
            jnp.array([0, 1], jnp.int32),
        )
        np.testing.assert_allclose(alone[0], together[seq], atol=1e-6, rtol=0)


def test_a_block_id_outside_the_pool_is_not_clipped_to_a_real_block():
    arrays = make(Case(name="bad", query_lens=(1, 1), seq_lens=(20, 20)), jnp.float32)
    num_blocks = arrays["pool"].shape[0]
    arrays["block_tables"] = arrays["block_tables"].at[0, 0].set(num_blocks)
    out = paged_attention(**arrays, implementation="xla")
    assert np.isnan(out[0]).all(), "the broken row must show"
    assert np.isfinite(out[1]).all(), "its neighbour must not"


def test_work_follows_the_real_lengths_not_the_padded_tables():
    # The loops over the context must have dynamic trip counts: a program whose padded tables are
    # 64 times wider does not hold larger arrays.
    def temp_bytes(max_blocks):
        case = Case(name="t", query_lens=(1, 20), seq_lens=(20, 20), max_blocks=max_blocks)
        compiled = jax.jit(functools.partial(paged_attention, implementation="xla")).lower(
            **make(case, jnp.float32)
        )
        analysis = compiled.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    tables = 2 * 4096 * 4
    assert temp_bytes(4096) <= temp_bytes(64) + 4 * tables


def _valid():
    return make(Case(name="v", query_lens=(1, 4), seq_lens=(9, 4)), jnp.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((5, 64))}, "must have 3, 5 and 2 axes"),
        ({"q": jnp.zeros((5, 4, 32))}, "with q's head_dim"),
        ({"pool": jnp.zeros((9, 1, 2, 16, 64))}, "with q's head_dim"),
        ({"pool": jnp.zeros((9, 3, 2, 16, 64))}, "pool must be"),
        ({"pool": jnp.zeros((9, 2, 2, 24, 64))}, r"block_size must be one of \(8, .*128\), got 24"),
        ({"q": jnp.zeros((5, 3, 64))}, "num_heads must be a multiple of num_kv_heads"),
        ({"q": jnp.zeros((5, 4, 64), jnp.bfloat16)}, "must have one dtype"),
        ({"seq_lens": jnp.zeros(3, jnp.int32)}, r"seq_lens must be \[num_seqs\]"),
        ({"query_start_loc": jnp.zeros(2, jnp.int32)}, r"query_start_loc \[num_seqs \+ 1\]"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"soft_cap": -1.0}, "soft_cap must be positive"),
        ({"max_query_len": 0}, "max_query_len must be at least 1"),
        ({"implementation": "cuda"}, "implementation must be one of"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**_valid(), **change})


def test_case_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert dataclasses.is_dataclass(CASES[0])
