import numpy as np
import pytest

from jpaged.sampling_params import SamplingParams
from jpaged.sampling_rows import (
    MAX_BANS,
    NUM_COLUMNS,
    Column,
    RequestSampling,
    empty_rows,
    pack_row,
)

VOCAB_SIZE = 1000
EOS = 2


def sampling(vocab_size=VOCAB_SIZE, seed=0, encode=None, **fields):
    return RequestSampling(
        SamplingParams(**fields),
        vocab_size=vocab_size,
        seed=seed,
        eos_token_ids=(EOS,),
        encode=encode,
    )


def encode_with(table):
    return lambda text: table[text]


def floats(row, first, last):
    return row[first : last + 1].view(np.float32).tolist()


def test_a_row_holds_every_parameter():
    row = sampling(
        temperature=0.5,
        top_p=0.25,
        min_p=0.125,
        presence_penalty=1.5,
        frequency_penalty=-1.5,
        repetition_penalty=2,
        top_k=40,
        seed=-2,
        logprobs=3,
        logit_bias={1: 1.0},
    ).row(7)
    assert row.dtype == np.int32
    assert row.shape == (NUM_COLUMNS,)
    expected = [0.5, 0.25, 0.125, 1.5, -1.5, 2.0]
    assert floats(row, Column.TEMPERATURE, Column.REPETITION_PENALTY) == expected
    assert row[Column.TOP_K] == 40
    assert row[Column.SEED_LOW : Column.SEED_HIGH + 1].view(np.uint32).tolist() == [
        2**32 - 2,
        2**32 - 1,
    ]
    assert row[Column.SEQ_INDEX] == 7
    assert row[Column.NUM_LOGPROBS] == 3
    assert row[Column.HAS_BIAS] == 1


def test_the_default_row_is_greedy_and_asks_for_nothing():
    greedy = sampling(temperature=0, top_p=0.5, top_k=3, min_p=0.5).row(0)
    np.testing.assert_array_equal(greedy, pack_row())
    np.testing.assert_array_equal(empty_rows(3), np.stack([pack_row()] * 3))


def test_the_requests_seed_goes_before_the_engines():
    assert sampling(seed=5).row(0)[Column.SEED_LOW] == 5
    asked = RequestSampling(SamplingParams(seed=6), vocab_size=VOCAB_SIZE, seed=5)
    assert asked.row(0)[Column.SEED_LOW] == 6


@pytest.mark.parametrize(("top_k", "packed"), [(-1, 0), (0, 0), (999, 999), (1000, 0), (5000, 0)])
def test_top_k_of_all_tokens_is_off(top_k, packed):
    assert sampling(top_k=top_k).row(0)[Column.TOP_K] == packed


@pytest.mark.parametrize(("logprobs", "packed"), [(None, -1), (0, 0), (5, 5), (-1, VOCAB_SIZE)])
def test_number_of_logprobs(logprobs, packed):
    assert sampling(logprobs=logprobs).row(0)[Column.NUM_LOGPROBS] == packed


@pytest.mark.parametrize(("fields", "packed"), [({}, 5), ({"logprobs": 9}, 9), ({"n": 2}, 5)])
def test_beams_ask_for_their_candidates(fields, packed):
    params = {"use_beam_search": True, "temperature": 0, "best_of": 4} | fields
    beams = sampling(**params)
    assert beams.row(0)[Column.NUM_LOGPROBS] == packed, "the beam width and one end token"
    assert not beams.is_plain


def test_extreme_values_stay_finite_and_positive_in_float32():
    row = sampling(temperature=1e300, top_p=1e-300, repetition_penalty=1e-300).row(0)
    values = np.array(floats(row, Column.TEMPERATURE, Column.REPETITION_PENALTY))
    assert np.isfinite(values).all()
    assert values[Column.TOP_P] > 0
    assert values[Column.REPETITION_PENALTY] > 0


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({}, False),
        ({"min_tokens": 3, "logprobs": 1, "temperature": 0}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"logit_bias": {1: 1}}, True),
        ({"allowed_token_ids": [1]}, True),
    ],
)
def test_state_is_needed_for_penalties_and_bias_only(fields, needed):
    assert sampling(**fields).needs_state is needed


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({}, True),
        ({"top_p": 0.5, "top_k": 3, "min_p": 0.5, "seed": 4}, True),
        ({"max_tokens": 3, "stop_token_ids": [7], "ignore_eos": True}, True),
        ({"temperature": 1.0}, True),
        ({"temperature": 1.0, "top_k": VOCAB_SIZE}, True),
        ({"temperature": 1.0, "top_k": 3}, False),
        ({"temperature": 1.0, "top_p": 0.9}, False),
        ({"temperature": 1.0, "min_p": 0.1}, False),
        ({"logprobs": 0}, False),
        ({"logprobs": 5}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"allowed_token_ids": [1]}, False),
        ({"bad_words": ["x"], "encode": encode_with({"x": [7], " x": [8]})}, False),
        ({"bad_words": ["x"], "encode": encode_with({"x": [7, 8], " x": [9, 8]})}, False),
        ({"min_tokens": 3}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"repetition_penalty": 1.1}, False),
    ],
)
def test_a_request_is_plain_if_it_asks_for_nothing_else(fields, plain):
    assert sampling(**{"temperature": 0.0, **fields}).is_plain is plain


def test_min_tokens_without_a_token_to_ban_is_plain():
    request = RequestSampling(SamplingParams(temperature=0, min_tokens=3), vocab_size=VOCAB_SIZE)
    assert request.is_plain


def bias_of(request):
    return dict(zip(request.bias_token_ids.tolist(), request.bias_values.tolist(), strict=True))


def test_allowed_tokens_keep_their_bias_and_lose_bad_words():
    request = sampling(
        allowed_token_ids=[5, 6, 7],
        logit_bias={6: 2.0, 9: 3.0},
        bad_words=["x"],
        encode=encode_with({"x": [7], " x": [8]}),
    )
    assert request.only_listed
    assert bias_of(request) == {5: 0.0, 6: 2.0}


def test_bad_words_of_one_token_go_in_the_bias():
    request = sampling(
        logit_bias={6: 2.0, 7: 2.0}, bad_words=["x"], encode=encode_with({"x": [7], " x": [8]})
    )
    assert not request.only_listed
    assert bias_of(request) == {6: 2.0, 7: -np.inf, 8: -np.inf}
    assert list(request.bans([], 0)) == []


def test_min_tokens_bans_stop_tokens_until_reached():
    request = sampling(min_tokens=3, stop_token_ids=[7])
    banned = [(EOS, -1), (7, -1)]
    assert list(request.bans([], 0)) == banned
    assert list(request.bans([4], 1)) == banned
    assert list(request.bans([4, 4], 1)) == []
    assert list(request.bans([4, 4, 4], 0)) == []


def test_bad_words_of_several_tokens_need_their_prefix():
    words = encode_with({"x": [5, 6, 7], " x": [8, 6, 7], "y": [3, 4], " y": [3, 3, 4]})
    request = sampling(bad_words=["x", "y"], encode=words)
    assert not request.needs_state
    # All output is known: the whole prefix is compared here.
    assert list(request.bans([], 0)) == []
    assert list(request.bans([5, 6], 0)) == [(7, -1)]
    assert list(request.bans([1, 8, 6], 0)) == [(7, -1)]
    assert list(request.bans([6, 5], 0)) == []
    assert list(request.bans([3], 0)) == [(4, -1)]
    # One token is pending: the end of the prefix is compared on the device.
    assert list(request.bans([], 1)) == [(4, 3)]
    assert list(request.bans([5], 1)) == [(7, 6), (4, 3)]
    assert list(request.bans([5, 6], 1)) == [(4, 3)]


def test_a_word_spelled_alike_after_a_space_counts_once():
    same_start = encode_with({"x": [5, 6], " x": [5, 7]})
    assert list(sampling(bad_words=["x"], encode=same_start).bans([5], 0)) == [(6, -1)]
    longer = encode_with({"x": [5, 6], " x": [4, 5, 6]})
    assert list(sampling(bad_words=["x"], encode=longer).bans([4, 5], 0)) == [(6, -1)]


def test_the_number_of_bans_is_limited_by_what_can_happen_at_once():
    table = {f"w{i}": [i, 500 + i, 900] for i in range(100)}
    table |= {" " + word: ids for word, ids in table.items()}
    request = sampling(bad_words=[f"w{i}" for i in range(100)], encode=encode_with(table))
    assert list(request.bans([17], 1)) == [(900, 517)]


def test_too_many_bans_are_refused():
    table = {f"w{i}": [i, 500 + i] for i in range(MAX_BANS)}
    table |= {" " + word: ids for word, ids in table.items()}
    fields = {"bad_words": list(table)[:MAX_BANS], "encode": encode_with(table)}
    assert len(sampling(**fields).bans([], 1)) == MAX_BANS
    with pytest.raises(ValueError, match=r"bad_words must ban at most 32 tokens .*, got 33"):
        sampling(**fields, min_tokens=1)
    with pytest.raises(ValueError, match=r"stop_token_ids must be at most 32 .*, got 33"):
        sampling(min_tokens=1, stop_token_ids=range(10, 42))
    sampling(min_tokens=0, stop_token_ids=range(10, 42))


def test_bad_words_that_cannot_be_tokenised_are_refused():
    with pytest.raises(ValueError, match="bad_words needs a tokenizer"):
        sampling(bad_words=["x"])
    with pytest.raises(ValueError, match="bad_words must tokenise to at least one token, got 'x'"):
        sampling(bad_words=["x"], encode=lambda text: [])
    with pytest.raises(ValueError, match=r"bad_words must tokenise to token ids in \[0, 999\]"):
        sampling(bad_words=["x"], encode=lambda text: [1000])


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [EOS], "min_tokens": 1},
        {"allowed_token_ids": [7], "bad_words": ["x"], "encode": lambda text: [7]},
        {"vocab_size": 1, "bad_words": ["x"], "encode": lambda text: [0]},
    ],
)
def test_a_request_without_a_token_to_sample_is_refused(fields):
    with pytest.raises(ValueError, match="must leave a token that bad_words and min_tokens"):
        sampling(**fields)
