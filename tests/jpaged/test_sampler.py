"""The effect of each sampling parameter, through the rows that a request writes."""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.sampler import (
    SamplerState,
    init_row,
    sample,
    sample_plain,
    token_logprobs,
    unpack_sampling_inputs,
)
from jpaged.sampling_params import SamplingParams
from jpaged.sampling_rows import MAX_BANS, RequestSampling, empty_rows

VOCAB_SIZE = 37
EOS = 2
NUM_ROWS = 9  # of the state; the last is scratch
GREEDY: dict[str, Any] = {"temperature": 0.0}

jitted_init_row = jax.jit(init_row)


@partial(jax.jit, static_argnames="max_logprobs")
def jitted_step(logits, arrays, state, max_logprobs):
    inputs = unpack_sampling_inputs(**arrays)
    return sample(logits, inputs, state, max_logprobs=max_logprobs)


@jax.jit
def jitted_plain_step(logits, arrays, state):
    return sample_plain(logits, unpack_sampling_inputs(**arrays), state)


class Row:
    """One sequence as the engine keeps it; `tokens` is its output."""

    def __init__(self, prompt=(0,), seed=0, seq_index=0, encode=None, samples=True, **fields):
        self.sampling = RequestSampling(
            SamplingParams(**fields),
            vocab_size=VOCAB_SIZE,
            seed=seed,
            eos_token_ids=(EOS,),
            encode=encode,
        )
        self.prompt = list(prompt)
        self.tokens: list[int] = []
        self.seq_index = seq_index
        self.samples = samples


class Batch:
    """Runs rows as the engine does, with their last token pending if it is asynchronous."""

    def __init__(self, *rows, num_pending=1):
        self.rows = rows
        self.num_pending = num_pending
        self.state = SamplerState.zeros(NUM_ROWS, VOCAB_SIZE)
        for i in range(len(rows)):
            self.admit(i)

    def admit(self, i):
        row = self.rows[i]
        ids = np.full(64, -1, np.int32)
        ids[: len(row.prompt) + len(row.tokens)] = row.prompt + row.tokens
        bias_ids, bias_values = np.full(64, -1, np.int32), np.zeros(64, np.float32)
        bias_ids[: len(row.sampling.bias_token_ids)] = row.sampling.bias_token_ids
        bias_values[: len(row.sampling.bias_values)] = row.sampling.bias_values
        self.state = jitted_init_row(
            self.state, i, ids, len(row.prompt), bias_ids, bias_values, row.sampling.only_listed
        )

    def step(self, logits, max_logprobs=0, size=8):
        """Samples once for every row; one size for most tests means one compilation."""
        logits = np.broadcast_to(np.asarray(logits, np.float32), (size, VOCAB_SIZE))
        packed = empty_rows(size)
        row_ids = np.full(size, NUM_ROWS - 1, np.int32)
        position, last = np.zeros(size, np.int32), np.zeros(size, np.int32)
        samples = np.zeros(size, np.int32)
        bans, if_last = np.full((2, size, MAX_BANS), -1, np.int32)
        for i, row in enumerate(self.rows):
            packed[i] = row.sampling.row(row.seq_index)
            row_ids[i] = i
            position[i] = len(row.prompt) + len(row.tokens)
            last[i] = (row.prompt + row.tokens)[-1]
            samples[i] = row.samples
            pending = min(self.num_pending, len(row.tokens))
            known = row.tokens[: len(row.tokens) - pending]
            for j, pair in enumerate(row.sampling.bans(known, pending)):
                bans[i, j], if_last[i, j] = pair
        arrays = {
            "packed_rows": packed,
            "position": position,
            "rows": row_ids,
            "input_token": last,
            "samples": samples,
            "ban_tokens": bans,
            "ban_if_last": if_last,
        }
        output, self.state = jitted_step(logits, arrays, self.state, max_logprobs)
        for row, token in zip(self.rows, np.asarray(output.tokens).tolist(), strict=False):
            if row.samples:
                row.tokens.append(token)
        return output

    def generate(self, logits, num_tokens):
        for _ in range(num_tokens):
            self.step(logits)
        return [row.tokens for row in self.rows]


def generate(logits, num_tokens, **fields):
    return Batch(Row(**fields)).generate(logits, num_tokens)[0]


def random_logits(seed=0, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, VOCAB_SIZE).astype(np.float32)


def softmax(x):
    weights = np.exp(x.astype(np.float64) - x.max())
    return weights / weights.sum()


def draw_many(logits, **fields):
    """Returns 2,000 draws of one request, at as many positions."""
    size = 2000
    packed = np.tile(
        RequestSampling(SamplingParams(**fields), vocab_size=VOCAB_SIZE).row(0), (size, 1)
    )
    unused = np.full((size, 1), -1, np.int32)
    arrays = {
        "packed_rows": packed,
        "position": np.arange(size, dtype=np.int32),
        "rows": np.zeros(size, np.int32),
        "input_token": np.zeros(size, np.int32),
        "samples": np.ones(size, np.int32),
        "ban_tokens": unused,
        "ban_if_last": unused,
    }
    state = SamplerState.zeros(1, VOCAB_SIZE)
    tokens = jitted_step(jnp.tile(logits, (size, 1)), arrays, state, 0)[0].tokens
    return np.bincount(np.asarray(tokens), minlength=VOCAB_SIZE)


def check_distribution(counts, probabilities):
    """Chi-square of tokens expected at least five times, the others as one cell."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    assert (counts[expected == 0] == 0).all()
    got = np.append(counts[common], counts[~common].sum())
    want = np.append(expected[common], max(expected[~common].sum(), 1e-9))
    statistic = ((got - want) ** 2 / want)[want > 1].sum()
    # With k degrees of freedom: mean k, deviation sqrt(2k). Seeds are fixed, so never flaky.
    degrees = (want > 1).sum() - 1
    assert statistic < degrees + 4 * np.sqrt(2 * degrees) + 1


# Temperature, top_k, top_p, min_p


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_scales_the_logits(temperature):
    logits = random_logits()
    check_distribution(draw_many(logits, temperature=temperature), softmax(logits / temperature))


def test_temperature_zero_takes_the_most_likely():
    logits = random_logits()
    assert generate(logits, 5, temperature=0, top_p=0.1) == [logits.argmax()] * 5


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_narrowest_filter_is_greedy(fields):
    logits = random_logits()
    assert generate(logits, 5, temperature=2.0, **fields) == [logits.argmax()] * 5


def test_top_k_draws_from_the_k_most_likely():
    logits = random_logits()
    allowed = logits >= np.sort(logits)[-5]
    expected = np.where(allowed, softmax(logits), 0)
    check_distribution(draw_many(logits, top_k=5), expected / expected.sum())


@pytest.mark.parametrize("top_k", [0, -1, VOCAB_SIZE, 10_000])
def test_top_k_of_everything_changes_nothing(top_k):
    logits = random_logits()
    np.testing.assert_array_equal(draw_many(logits, top_k=top_k), draw_many(logits))


def test_top_p_draws_from_the_smallest_set_that_reaches_it():
    logits = random_logits()
    order = np.argsort(-logits)
    size = np.searchsorted(softmax(logits)[order].cumsum(), 0.8) + 1
    expected = np.zeros(VOCAB_SIZE)
    expected[order[:size]] = softmax(logits)[order[:size]]
    check_distribution(draw_many(logits, top_p=0.8), expected / expected.sum())


def test_min_p_drops_tokens_far_less_likely_than_the_first():
    logits = random_logits()
    expected = softmax(logits)
    expected[expected < 0.1 * expected.max()] = 0
    check_distribution(draw_many(logits, min_p=0.1), expected / expected.sum())


# Penalties


def penalised(logits, prompt, output, presence=0.0, frequency=0.0, repetition=1.0):
    """The definition, in numpy."""
    counts = np.bincount(output, minlength=VOCAB_SIZE)
    seen = (counts > 0) | np.isin(np.arange(VOCAB_SIZE), prompt)
    factor = np.where(logits > 0, 1 / repetition, repetition)
    logits = np.where(seen, logits * factor, logits)
    return logits - frequency * counts - presence * (counts > 0)


PENALTIES = [
    {"presence": 1.7},
    {"presence": -1.0},
    {"frequency": 0.9},
    {"frequency": -0.4},
    {"repetition": 1.8},
    {"repetition": 0.6},
    {"presence": 0.5, "frequency": 0.3, "repetition": 1.2},
]


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("offset", [0.0, -10.0])
def test_penalties_follow_their_definition(penalties, offset):
    logits = random_logits(3) + offset
    row = Row(prompt=[1, 5, 5, 8], **GREEDY, **{f"{k}_penalty": v for k, v in penalties.items()})
    batch = Batch(row)
    for _ in range(25):
        expected = penalised(logits, row.prompt, row.tokens, **penalties)
        batch.step(logits)
        assert expected[row.tokens[-1]] >= expected.max() - 1e-5


def test_presence_penalty_counts_output_only_and_once():
    logits = np.zeros(VOCAB_SIZE)
    logits[[5, 6]] = 1.0, 0.5
    assert generate(logits, 3, prompt=[5], presence_penalty=0.9, **GREEDY) == [5, 6, 5]


def test_frequency_penalty_grows_with_each_occurrence():
    logits = np.zeros(VOCAB_SIZE)
    logits[5] = 1.0
    assert generate(logits, 4, prompt=[5], frequency_penalty=0.4, **GREEDY) == [5, 5, 5, 0]


def test_repetition_penalty_counts_the_prompt():
    logits = np.full(VOCAB_SIZE, -1.0)
    logits[[5, 6]] = 2.0, 1.5
    assert generate(logits, 1, prompt=[5], repetition_penalty=2.0, **GREEDY) == [6]


def test_penalised_distribution():
    logits = random_logits(4)
    batch = Batch(row := Row(prompt=[1], presence_penalty=2.0, frequency_penalty=1.0, seed=9))
    batch.step(logits)
    first = row.tokens[0]
    output = batch.step(np.where(np.arange(VOCAB_SIZE) == first, 2.9, -30.0), max_logprobs=5)
    # 2.9 - 2.0 - 1.0 < 0, far above the rest: still drawn, and the logprob is the raw one.
    assert row.tokens[1] == first
    assert np.asarray(output.logprobs)[0] == pytest.approx(0, abs=1e-6)


def test_penalties_survive_preemption():
    logits = random_logits(5)
    fields: dict[str, Any] = {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
    }
    whole = generate(logits, 20, prompt=[3, 4], **fields, seed=1)
    batch = Batch(row := Row(prompt=[3, 4], **fields, seed=1))
    batch.generate(logits, 10)
    batch.state = SamplerState.zeros(NUM_ROWS, VOCAB_SIZE)
    batch.admit(0)
    batch.generate(logits, 10)
    assert row.tokens == whole


# Bias and bans


def test_logit_bias_forces_and_bans():
    logits = np.zeros(VOCAB_SIZE)
    logits[5] = 10.0
    assert generate(logits, 1, logit_bias={5: -100, 6: 1.0}, **GREEDY) == [6]
    assert set(generate(logits, 20, logit_bias={9: 100})) == {9}


def test_logit_bias_adds_to_the_logits():
    logits = random_logits(6)
    batch = Batch(Row(logit_bias={3: 1.25, 4: -2.5}, **GREEDY))
    biased = logits.copy()
    biased[[3, 4]] += 1.25, -2.5
    bias = np.asarray(batch.state.bias)[0]
    np.testing.assert_allclose(logits + bias, biased, rtol=1e-6)


def test_allowed_token_ids_restrict():
    tokens = generate(random_logits(7), 40, allowed_token_ids=[3, 30], temperature=5.0)
    assert set(tokens) == {3, 30}
    assert set(generate(random_logits(7), 5, allowed_token_ids=[36])) == {36}


WORDS = {"one": [5], " one": [6], "two": [7, 8], " two": [9, 8], "three": [7, 7, 9]}
WORDS[" three"] = WORDS["three"]


def contains(tokens, word):
    return any(tokens[i : i + len(word)] == word for i in range(len(tokens)))


@pytest.mark.parametrize("num_pending", [0, 1])
@pytest.mark.parametrize("word", ["one", "two", "three"])
def test_bad_words_are_never_produced(word, num_pending):
    logits = np.full(VOCAB_SIZE, -np.inf)
    logits[5:10] = 0.0
    free = Row(seed=3)
    bound = Row(seed=3, bad_words=[word], encode=WORDS.__getitem__)
    Batch(free, bound, num_pending=num_pending).generate(logits, 60)
    assert contains(free.tokens, WORDS[word])
    assert not contains(bound.tokens, WORDS[word])
    assert not contains(bound.tokens, WORDS[" " + word])
    others = {5, 6, 7, 8, 9} - ({5, 6} if word == "one" else set())
    assert set(bound.tokens[1:]) == others, "no token is banned without its prefix"


def test_a_bad_word_may_begin_in_the_prompt():
    logits = np.where(np.arange(VOCAB_SIZE) == 8, 5.0, 0.0)
    row: dict[str, Any] = {"prompt": [7], "bad_words": ["two"], "encode": WORDS.__getitem__}
    assert generate(logits, 1, **row, **GREEDY) == [8]


@pytest.mark.parametrize("num_pending", [0, 1])
def test_min_tokens_holds_off_end_and_stop_tokens(num_pending):
    logits = np.zeros(VOCAB_SIZE)
    logits[[EOS, 4, 9]] = 9.0, 8.0, 7.0
    row = Row(min_tokens=3, stop_token_ids=[4], **GREEDY)
    Batch(row, num_pending=num_pending).generate(logits, 5)
    assert row.tokens == [9, 9, 9, EOS, EOS]


def test_a_ban_of_everything_is_not_applied():
    logits = np.where(np.arange(VOCAB_SIZE) == EOS, 0.0, -np.inf)
    assert generate(logits, 1, min_tokens=1) == [EOS]


# Masks of structured output

ANYTHING = {"choice": ["a"]}  # what the form is does not matter here: the mask is given
EVERY_FEATURE: list[dict[str, Any]] = [
    GREEDY,
    {"temperature": 1.3, "seed": 4},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.01, "seed": 5},
    {"temperature": 1.0, "seed": 6, "presence_penalty": 1.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 7, "logit_bias": {3: 2.0}, "min_tokens": 3},
]


def masked_batch(allowed, *rows, num_pending=1):
    """A batch where these rows of `bool[N, V]` are the masks of the first rows."""
    batch = Batch(*rows, num_pending=num_pending)
    bits = np.zeros((NUM_ROWS, -(-VOCAB_SIZE // 32) * 32), bool)
    bits[: len(allowed), :VOCAB_SIZE] = allowed
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    batch.state = dataclasses.replace(batch.state, allowed=jnp.asarray(words))
    return batch


@given(st.integers(0, 2**32 - 1), st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1))
def test_greedy_takes_the_most_likely_token_that_is_allowed(seed, tokens):
    logits = random_logits(seed)
    allowed = np.isin(np.arange(VOCAB_SIZE), list(tokens))
    batch = masked_batch([allowed], Row(structured_outputs=ANYTHING, **GREEDY))
    assert batch.generate(logits, 2) == [[np.where(allowed, logits, -np.inf).argmax()] * 2]


@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"logit_bias": {30: 5.0}}])
def test_draws_are_those_of_the_allowed_tokens(fields):
    logits = random_logits(11)
    allowed = np.arange(VOCAB_SIZE) % 4 == 2
    row = Row(structured_outputs=ANYTHING, seed=1, **fields)
    (tokens,) = masked_batch([allowed], row).generate(logits, 400)
    wanted = np.where(allowed, logits, -np.inf)
    if "logit_bias" in fields:
        wanted[30] += 5.0
    if "top_k" in fields:
        wanted[wanted < np.sort(wanted)[-3]] = -np.inf
    check_distribution(np.bincount(tokens, minlength=VOCAB_SIZE), softmax(wanted))


@pytest.mark.parametrize("fields", EVERY_FEATURE)
def test_a_mask_of_everything_changes_no_bit(fields):
    logits = np.stack([random_logits(seed) for seed in range(8)])
    free = Batch(Row(logprobs=3, **fields))
    masked = masked_batch(
        np.ones((1, VOCAB_SIZE), bool), Row(logprobs=3, structured_outputs=ANYTHING, **fields)
    )
    for _ in range(20):
        outputs = free.step(logits, max_logprobs=3), masked.step(logits, max_logprobs=3)
        for a, b in zip(*map(jax.tree.leaves, outputs), strict=True):
            np.testing.assert_array_equal(a[:1], b[:1])
    assert free.rows[0].tokens == masked.rows[0].tokens


def test_a_mask_touches_no_neighbour():
    logits = random_logits(12)
    rows = [Row(**fields) for fields in EVERY_FEATURE]
    alone = Batch(*rows).generate(logits, 20)
    rows = [Row(**fields) for fields in EVERY_FEATURE]
    allowed = np.zeros((6, VOCAB_SIZE), bool)
    allowed[5, 8] = True  # those of the others are empty
    mixed = masked_batch(allowed, *rows, Row(structured_outputs=ANYTHING)).generate(logits, 20)
    assert mixed == [*alone, [8] * 20]


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [3]},
        {"bad_words": ["one"], "encode": {"one": [7], " one": [7]}.__getitem__},
        {"min_tokens": 9, "stop_token_ids": [7]},
    ],
)
def test_what_leaves_no_allowed_token_gives_way(fields):
    allowed = np.arange(VOCAB_SIZE) == 7
    batch = masked_batch([allowed], Row(structured_outputs=ANYTHING, **fields))
    assert batch.generate(random_logits(13), 3) == [[7, 7, 7]]


def test_structured_rows_are_not_plain():
    params = SamplingParams(structured_outputs=ANYTHING, **GREEDY)
    assert not RequestSampling(params, vocab_size=VOCAB_SIZE).is_plain


# Seeds and neighbours


def test_a_seed_fixes_the_draws():
    logits = random_logits()
    first = generate(logits, 30, seed=5)
    assert first == generate(logits, 30, seed=5)
    assert first != generate(logits, 30, seed=6)
    assert first != generate(logits, 30, seed=5 + 2**32)


def test_samples_of_one_request_differ():
    rows = [Row(seed=5, seq_index=i) for i in range(4)]
    outputs = Batch(*rows).generate(random_logits(), 20)
    assert len({tuple(tokens) for tokens in outputs}) == 4


NEIGHBOURS: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 2, "top_k": 5, "temperature": 0.7},
    {"seed": 3, "top_p": 0.6},
    {"seed": 4, "presence_penalty": 1.0, "repetition_penalty": 1.3},
    {"seed": 5, "logit_bias": {3: 2.0}, "min_p": 0.05},
    {"seed": 6, "min_tokens": 5, "bad_words": ["two"], "encode": WORDS.__getitem__},
    {"temperature": 0.0},
    {"seed": 7, "allowed_token_ids": [3, 4, 5, 6]},
]


def test_a_request_does_not_depend_on_its_neighbours():
    logits = random_logits(8)
    alone = [generate(logits, 12, **fields) for fields in NEIGHBOURS]
    batch = Batch(single := Row(**NEIGHBOURS[3]))
    for _ in range(12):
        batch.step(logits, size=1)
    assert single.tokens == alone[3]
    together = Batch(*(Row(**fields) for fields in NEIGHBOURS)).generate(logits, 12)
    assert together == alone
    backwards = Batch(*(Row(**fields) for fields in NEIGHBOURS[::-1])).generate(logits, 12)
    assert backwards[::-1] == alone


# State


def test_rows_that_do_not_sample_change_nothing():
    batch = Batch(
        Row(samples=False, presence_penalty=1.0, seed=1), Row(presence_penalty=1.0, **GREEDY)
    )
    logits = random_logits()
    batch.step(logits)
    counts = np.asarray(batch.state.output_counts)
    assert counts.sum() == 1
    assert counts[1, logits.argmax()] == 1
    assert np.asarray(batch.state.last_tokens).tolist() == [0, logits.argmax(), *[0] * 7]


def test_last_tokens_are_kept_for_every_sampled_row():
    batch = Batch(Row(seed=1), Row(**GREEDY), Row(seed=2, top_k=3))
    batch.generate(random_logits(), 3)
    expected = [row.tokens[-1] for row in batch.rows]
    assert np.asarray(batch.state.last_tokens)[:3].tolist() == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_rows_need_the_plain_sampler_only(dtype):
    rows = 6
    logits = np.stack([random_logits(seed) for seed in range(rows)])
    logits[1] = np.round(logits[1])  # ties
    logits[2, :30] = -np.inf
    row_ids = np.array([4, 0, 7, 2, 8, 8], np.int32)
    samples = np.array([1, 1, 1, 0, 0, 0], np.int32)
    bans = np.full((rows, MAX_BANS), -1, np.int32)
    fields: tuple[dict[str, Any], ...] = (GREEDY, {}, {"temperature": 0.3}, GREEDY, {}, {})
    packed = [
        RequestSampling(SamplingParams(**f), vocab_size=VOCAB_SIZE, seed=3).row(i)
        for i, f in enumerate(fields)
    ]
    arrays = {
        "packed_rows": np.stack(packed),
        "position": np.arange(rows, dtype=np.int32),
        "rows": row_ids,
        "input_token": np.zeros(rows, np.int32),
        "samples": samples,
        "ban_tokens": bans,
        "ban_if_last": bans,
    }
    zeros = SamplerState.zeros(NUM_ROWS, VOCAB_SIZE)
    state = dataclasses.replace(
        zeros,
        last_tokens=jnp.arange(NUM_ROWS, dtype=jnp.int32) + 100,
        output_counts=zeros.output_counts + 3,
        prompt_mask=~zeros.prompt_mask,
        bias=zeros.bias + 1.5,
    )
    x = jnp.asarray(logits, dtype)
    expected, expected_state = jitted_step(x, arrays, state, 0)
    tokens, new_state = jitted_plain_step(x, arrays, state)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, expected.tokens)
    jax.tree.map(np.testing.assert_array_equal, new_state, expected_state)
    kept = np.asarray(state.last_tokens).copy()
    kept[row_ids[:3]] = tokens[:3]
    assert tokens[0] == np.asarray(x, np.float32)[0].argmax()
    np.testing.assert_array_equal(new_state.last_tokens, kept)


def test_init_row_clears_what_the_row_held_and_touches_no_other():
    batch = Batch(Row(prompt=[1], presence_penalty=1.0), Row(prompt=[2], frequency_penalty=1.0))
    batch.generate(random_logits(), 4)
    counts = np.asarray(batch.state.output_counts)
    batch.rows = (Row(prompt=[7, 7], logit_bias={3: 1.0}), batch.rows[1])
    batch.rows[0].tokens = [4, 4, 5]
    batch.admit(0)
    state = jax.tree.map(np.asarray, batch.state)
    np.testing.assert_array_equal(
        state.output_counts[0], np.bincount([4, 4, 5], minlength=VOCAB_SIZE)
    )
    assert np.flatnonzero(state.prompt_mask[0]).tolist() == [7]
    assert np.flatnonzero(state.bias[0]).tolist() == [3]
    np.testing.assert_array_equal(state.output_counts[1], counts[1])


def test_state_is_updated_in_place():
    rows = 3
    state = jax.eval_shape(lambda: SamplerState.zeros(301, 1000))
    arrays = dict.fromkeys(("position", "rows", "input_token", "samples"), np.zeros(rows, np.int32))
    bans = np.full((rows, MAX_BANS), -1, np.int32)
    arrays |= {"packed_rows": empty_rows(rows), "ban_tokens": bans, "ban_if_last": bans}

    def step(logits, arrays, state):
        return sample(logits, unpack_sampling_inputs(**arrays), state, max_logprobs=2)

    logits = jax.ShapeDtypeStruct((rows, 1000), jnp.float32)
    compiled = jax.jit(step, donate_argnums=2).lower(logits, arrays, state).compile()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert memory.alias_size_in_bytes >= size
    assert text is not None
    assert not re.findall(r"\[301,1000\]\S* copy\(", text)


# Logprobs


def numpy_logprobs(logits):
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_logprobs_are_those_of_the_raw_logits():
    logits = random_logits(9)
    expected = numpy_logprobs(logits)
    fields: dict[str, Any] = {"temperature": 0.5, "logit_bias": {4: 3.0}, "presence_penalty": 1.0}
    batch = Batch(*(Row(logprobs=4, seed=seed, **fields) for seed in range(6)))
    output = jax.tree.map(lambda x: np.asarray(x)[:6], batch.step(logits, max_logprobs=5))
    order = np.argsort(-logits)
    np.testing.assert_allclose(output.logprobs, expected[output.tokens], atol=1e-5)
    np.testing.assert_array_equal(logits[order[output.ranks - 1]], logits[output.tokens])
    np.testing.assert_array_equal(output.top_token_ids, np.tile(order[:5], (6, 1)))
    np.testing.assert_allclose(output.top_logprobs, np.tile(expected[order[:5]], (6, 1)), atol=1e-5)
    assert len(set(output.tokens.tolist())) > 1


def test_top_logprobs_of_a_large_vocabulary():
    logits = np.random.default_rng(0).normal(0, 3, (3, 3001)).astype(np.float32)
    logits[1] = np.round(logits[1])  # ties
    logits[2, 5:] = -np.inf
    token_ids = np.array([3000, 17, 2], np.int32)
    found = jax.jit(partial(token_logprobs, max_logprobs=7))(logits, token_ids)
    found = jax.tree.map(np.asarray, found)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal(found.top_token_ids, order)
    expected = np.stack([numpy_logprobs(row)[ids] for row, ids in zip(logits, order, strict=True)])
    np.testing.assert_allclose(found.top_logprobs, expected, atol=1e-5)


def test_asking_for_zero_logprobs_gives_that_of_the_token_only():
    logits = random_logits(9)
    output = Batch(Row(logprobs=0, **GREEDY), Row(**GREEDY)).step(logits, max_logprobs=5)
    assert np.asarray(output.logprobs)[0] == pytest.approx(numpy_logprobs(logits).max(), abs=1e-5)
    assert np.asarray(output.ranks)[0] == 1


def test_asking_for_logprobs_changes_no_token():
    logits = random_logits(9)
    plain, asked = Batch(Row(seed=1)), Batch(Row(seed=1, logprobs=2))
    for _ in range(10):
        plain.step(logits)
        asked.step(logits, max_logprobs=5)
    assert plain.rows[0].tokens == asked.rows[0].tokens


@pytest.mark.parametrize("logprobs", [None, 3])
def test_without_logprobs_nothing_is_returned(logprobs):
    output = Batch(Row(logprobs=logprobs, **GREEDY)).step(random_logits(), max_logprobs=0)
    assert output.top_token_ids.shape == output.top_logprobs.shape == (8, 0)
    assert np.asarray(output.logprobs).tolist() == [0.0] * 8
    unasked = Batch(Row(**GREEDY)).step(random_logits(), max_logprobs=5)
    assert unasked.top_token_ids.shape == (8, 5)
    assert np.asarray(unasked.logprobs).tolist() == [0.0] * 8


def test_token_logprobs_of_a_prompt():
    logits = np.stack([random_logits(seed) for seed in range(6)])
    logits[5] = np.round(logits[5])
    token_ids = np.array([0, 5, 36, 7, 8, 9], np.int32)
    found = jax.jit(partial(token_logprobs, max_logprobs=3))(logits, token_ids)
    found = jax.tree.map(np.asarray, found)
    for i, token in enumerate(token_ids.tolist()):
        expected = numpy_logprobs(logits[i])
        assert found.logprobs[i] == pytest.approx(expected[token], abs=1e-5)
        assert found.ranks[i] == 1 + (logits[i] > logits[i, token]).sum()
        np.testing.assert_allclose(found.top_logprobs[i], -np.sort(-expected)[:3], atol=1e-5)
        np.testing.assert_allclose(
            expected[found.top_token_ids[i]], found.top_logprobs[i], atol=1e-5
        )


def test_token_logprobs_without_top_tokens():
    found = token_logprobs(jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), max_logprobs=0)
    np.testing.assert_allclose(found.logprobs, -np.log(8), rtol=1e-6)
    assert found.top_token_ids.shape == (2, 0)
