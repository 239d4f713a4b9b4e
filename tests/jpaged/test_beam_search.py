"""The search itself, against transformers' results and against searches too slow to be wrong."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.beam_search import BeamSearch

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "beam_search.json").read_text("utf-8"))


def _search(logprobs_after, *, num_columns=None, **options):
    """Runs a search to its end; `logprobs_after` gives f32[V] after a tuple of tokens."""
    search = BeamSearch(**options)
    beams = [()]
    while not search.is_done:
        rows = np.array([logprobs_after(beam) for beam in beams], np.float32)
        columns = min(num_columns or search.num_candidates, rows.shape[1])
        token_ids = np.argsort(-rows, axis=1, kind="stable")[:, :columns].astype(np.int32)
        chosen = search.advance(token_ids, np.take_along_axis(rows, token_ids, axis=1))
        beams = [(*beams[parent], token) for parent, token in chosen]
        assert len(beams) == (0 if search.is_done else search.num_beams)
    return search


def _results(search, num=None):
    found = search.results(search.beam_width if num is None else num)
    return [(hypothesis.token_ids, hypothesis.score) for hypothesis in found]


@pytest.mark.parametrize("case", GOLDEN["tables"], ids=range(len(GOLDEN["tables"])))
def test_results_are_those_of_transformers_to_the_last_bit(case):
    table = np.array(case["logprobs"], np.float32)
    search = _search(
        lambda tokens: table[tokens[-1] if tokens else case["first_token_id"]],
        beam_width=case["beam_width"],
        max_tokens=case["max_tokens"],
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
        end_token_ids=case["end_token_ids"],
    )
    found = search.results(case["beam_width"])
    assert [h.token_ids for h in found] == [h["token_ids"] for h in case["hypotheses"]]
    expected = np.array([h["score"] for h in case["hypotheses"]], np.float32)
    np.testing.assert_array_equal(np.array([h.score for h in found], np.float32), expected)
    for hypothesis in found:
        is_end = hypothesis.token_ids[-1] in case["end_token_ids"]
        assert hypothesis.finish_reason == ("stop" if is_end else "length")


def test_golden_tables_end_in_every_way():
    lengths = [
        (len(h["token_ids"]), table["max_tokens"])
        for table in GOLDEN["tables"]
        for h in table["hypotheses"]
    ]
    assert sum(length < limit for length, limit in lengths) >= 20
    assert sum(length == limit for length, limit in lengths) >= 20


@st.composite
def _problems(draw):
    """A random model of up to 5 tokens whose log-probabilities depend on everything before."""
    vocab_size = draw(st.integers(2, 5))
    seed = draw(st.integers(0, 2**32 - 1))
    rows = {}

    def logprobs_after(tokens):
        if tokens not in rows:
            random = np.random.RandomState([seed % 2**32, len(tokens), *tokens])
            logits = random.standard_normal(vocab_size) * 2
            rows[tokens] = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
        return rows[tokens]

    options = {
        "max_tokens": draw(st.integers(1, 4)),
        "length_penalty": draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0])),
        "early_stopping": draw(st.sampled_from([False, True, "never"])),
        "end_token_ids": draw(st.sets(st.integers(0, vocab_size - 1), max_size=vocab_size)),
    }
    return vocab_size, logprobs_after, options


def _sum(logprobs_after, tokens):
    total = np.float32(0)
    for index, token in enumerate(tokens):
        total += logprobs_after(tokens[:index])[token]
    return total


def _score(logprobs_after, tokens, penalty, length=None):
    return _sum(logprobs_after, tokens) / np.float32((length or len(tokens)) ** penalty)


@given(_problems())
@settings(max_examples=150)
def test_a_search_as_wide_as_the_tree_finds_the_best_of_all(problem):
    vocab_size, logprobs_after, options = problem
    ends, limit = options["end_token_ids"], options["max_tokens"]
    complete = [
        tokens
        for length in range(1, limit + 1)
        for tokens in itertools.product(range(vocab_size), repeat=length)
        if not ends & set(tokens[:-1]) and (tokens[-1] in ends or length == limit)
    ]
    search = _search(logprobs_after, beam_width=vocab_size**limit, **options)
    penalty = options["length_penalty"]
    scores = {tokens: _score(logprobs_after, tokens, penalty) for tokens in complete}
    expected = sorted(complete, key=lambda tokens: (-scores[tokens], tokens))
    found = [(tuple(token_ids), score) for token_ids, score in _results(search)]
    assert sorted(found, key=lambda entry: (-entry[1], entry[0])) == [
        (tokens, scores[tokens]) for tokens in expected
    ]
    assert [score for _, score in found] == sorted(scores.values(), reverse=True)


def _naive_search(vocab_size, logprobs_after, beam_width, options):
    """The same search over the whole vocabulary, every sum made anew; (tokens, score)."""
    ends, limit = options["end_token_ids"], options["max_tokens"]
    penalty, early_stopping = options["length_penalty"], options["early_stopping"]
    beams, finished = [()], []
    for length in range(1, limit + 1):
        ranked = sorted(
            ((*beam, token) for beam in beams for token in range(vocab_size)),
            key=lambda tokens: -_sum(logprobs_after, tokens),
        )
        complete = [t for t in ranked[:beam_width] if t[-1] in ends or length == limit]
        finished += [(t, _score(logprobs_after, t, penalty)) for t in complete]
        finished = sorted(finished, key=lambda entry: -entry[1])[:beam_width]
        beams = [t for t in ranked if t[-1] not in ends and length < limit][:beam_width]
        if not beams:
            break
        if len(finished) == beam_width:
            favoured = limit if early_stopping == "never" and penalty > 0 else length
            best = _score(logprobs_after, beams[0], penalty, favoured)
            if early_stopping is True or best <= finished[-1][1]:
                break
    return [(list(tokens), score) for tokens, score in finished]


@given(_problems(), st.integers(1, 6))
@settings(max_examples=300)
def test_any_search_finds_what_a_naive_one_over_the_whole_vocabulary_finds(problem, beam_width):
    vocab_size, logprobs_after, options = problem
    expected = _naive_search(vocab_size, logprobs_after, beam_width, options)
    assert _results(_search(logprobs_after, beam_width=beam_width, **options)) == expected
    whole = _search(logprobs_after, num_columns=vocab_size, beam_width=beam_width, **options)
    assert _results(whole) == expected


def _logs(*rows):
    return np.log(np.array(rows, np.float32))


def _ids(num_rows, *ids):
    return np.tile(np.array(ids, np.int32), (num_rows, 1))


def test_beams_are_chosen_and_dropped():
    search = BeamSearch(beam_width=2, max_tokens=3)
    assert (search.num_beams, search.num_candidates) == (1, 2)
    assert search.advance(_ids(1, 7, 8), _logs([0.5, 0.3])) == [(0, 7), (0, 8)]
    assert search.num_beams == 2
    # Both continue the second beam: the first one is dropped.
    chosen = search.advance(_ids(2, 4, 5), _logs([0.1, 0.1], [0.5, 0.4]))
    assert chosen == [(1, 4), (1, 5)]
    assert [h.finish_reason for h in search.results(2)] == [None, None], "still going on"
    assert search.advance(_ids(2, 4, 5), _logs([0.6, 0.3], [0.6, 0.3])) == []
    assert search.is_done
    best, second = search.results(9)
    assert (best.token_ids, second.token_ids) == ([8, 4, 4], [8, 5, 4])
    assert best.cumulative_logprob == pytest.approx(np.log(0.3 * 0.5 * 0.6), abs=1e-6)
    assert best.score == pytest.approx(best.cumulative_logprob / 3)
    assert best.finish_reason == "length"


def test_equal_sums_go_to_the_first_beam_and_the_first_candidate():
    search = BeamSearch(beam_width=2, max_tokens=9)
    assert search.advance(_ids(1, 7, 8, 9), _logs([0.2, 0.2, 0.2])) == [(0, 7), (0, 8)]
    chosen = search.advance(_ids(2, 4, 5, 6), _logs([0.3, 0.3, 0.3], [0.3, 0.3, 0.3]))
    assert chosen == [(0, 4), (0, 5)]


def test_an_end_token_counts_only_among_the_best():
    search = BeamSearch(beam_width=2, max_tokens=9, end_token_ids=[1])
    assert search.advance(_ids(1, 7, 8, 1), _logs([0.5, 0.3, 0.1])) == [(0, 7), (0, 8)]
    assert search.results(1)[0].finish_reason is None, "third of two: not finished"
    chosen = search.advance(_ids(2, 1, 7, 8), _logs([0.5, 0.3, 0.2], [0.2, 0.2, 0.2]))
    assert chosen == [(0, 7), (0, 8)]
    (stopped, *_) = search.results(1)
    assert (stopped.token_ids, stopped.finish_reason) == ([7, 1], "stop")


def test_a_search_without_any_way_on_is_over():
    search = BeamSearch(beam_width=3, max_tokens=9, end_token_ids=[0, 1])
    assert search.advance(_ids(1, 0, 1), _logs([0.6, 0.4])) == []
    assert search.is_done
    assert [h.token_ids for h in search.results(3)] == [[0], [1]]


def test_positions_tell_what_else_was_likely():
    search = BeamSearch(beam_width=2, max_tokens=1)
    search.advance(_ids(1, 7, 8, 9), _logs([0.5, 0.25, 0.25]))
    (position,) = search.results(2)[1].tokens
    assert (position.token_id, position.rank) == (8, 2)
    assert position.logprob == pytest.approx(np.log(0.25))
    assert position.top_token_ids.tolist() == [7, 8, 9]
