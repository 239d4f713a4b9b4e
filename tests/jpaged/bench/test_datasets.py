"""Requests have the lengths asked for, and files are read as they say."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from jpaged.bench import datasets
from jpaged.bench.requests import BenchRequest, MadeUpPrompts


def rng():
    return np.random.default_rng(3)


def random_requests(count=200, prompts=None, **options):
    lengths = {"input_len": 20, "output_len": 10} | options
    return datasets.random_requests(count, prompts or MadeUpPrompts(0), rng(), **lengths)


def test_random_prompts_have_as_many_words_as_tokens_asked_for():
    requests = random_requests()
    assert {len(str(r.prompt).split()) for r in requests} == {20}
    assert {(r.prompt_tokens, r.max_tokens, r.arrival_s) for r in requests} == {(20, 10, None)}
    assert len({str(r.prompt) for r in requests}) == len(requests)


def test_random_lengths_vary_by_the_ratio():
    requests = random_requests(2000, range_ratio=0.5)
    inputs = [r.prompt_tokens or 0 for r in requests]
    outputs = [r.max_tokens for r in requests]
    assert (min(inputs), max(inputs), min(outputs), max(outputs)) == (10, 30, 5, 15)
    assert np.mean(inputs) == pytest.approx(20, rel=0.02)


def test_shared_prefix_comes_first_and_on_top():
    first, second, *_ = (str(r.prompt).split() for r in random_requests(prefix_len=7))
    assert len(first) == 27
    assert first[:7] == second[:7]
    assert first[7:] != second[7:]


def test_prompts_of_token_ids_stay_within_the_vocabulary():
    requests = random_requests(prompts=MadeUpPrompts(0, as_token_ids=True, vocab_size=300))
    ids: list[Any] = [token for r in requests for token in r.prompt]
    assert min(ids) == 150
    assert max(ids) == 299


def test_seed_fixes_the_prompts():
    assert random_requests() == random_requests()
    assert random_requests(prompts=MadeUpPrompts(1)) != random_requests()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_len": 0}, "random_input_len must be at least 1, got 0"),
        ({"output_len": 0}, "random_output_len must be at least 1, got 0"),
        ({"prefix_len": -1}, "random_prefix_len must be at least 0, got -1"),
        ({"range_ratio": 1.0}, r"random_range_ratio must be in \[0, 1\), got 1.0"),
    ],
)
def test_lengths_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        random_requests(**options)


def test_vocabulary_too_small_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 2, got 1"):
        MadeUpPrompts(0, as_token_ids=True, vocab_size=1)


def test_custom_rows_are_repeated_until_there_are_enough(tmp_path):
    file = tmp_path / "in.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": "a", "output_tokens": 3}, {"messages": messages}, {"prompt": [1, 2]}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    requests = datasets.custom_requests(str(file), 5, 9)
    a, chat, ids = BenchRequest("a", 3), BenchRequest(messages, 9), BenchRequest([1, 2], 9)
    assert requests == [a, chat, ids, a, chat]
    assert [r.is_chat for r in requests[:3]] == [False, True, False]
    assert datasets.custom_requests(str(file), 1, 9) == [a]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 of .* is not JSON"),
        ("[1]", r"line 1 of .* must hold a JSON object, got '\[1\]'"),
        ('{"prompt": "a"}\n{}', "line 2 of .* must have a non-empty prompt or messages, got None"),
        ('{"prompt": 7}', "must have a non-empty prompt or messages, got 7"),
        ('{"prompt": "a", "output_tokens": 0}', "output_tokens must be an integer >= 1, got 0"),
        ("\n", "dataset_path must hold at least one row, got none"),
    ],
)
def test_unusable_custom_rows_are_refused(text, message, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        datasets.custom_requests(str(file), 9, 9)


def test_custom_output_len_is_checked(tmp_path):
    with pytest.raises(ValueError, match="custom_output_len must be at least 1, got 0"):
        datasets.custom_requests("x", 1, 0)


async def count_words(texts):
    return [len(text.split()) for text in texts]


def sharegpt(tmp_path, pairs, count, **options):
    entries = [
        {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]}
        for a, b in pairs
    ]
    entries.append({"conversations": [{"from": "human", "value": "alone here with nobody"}]})
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps(entries))
    return asyncio.run(datasets.sharegpt_requests(str(file), count, rng(), count_words, **options))


def words(count, word="w"):
    return " ".join([word] * count)


def test_sharegpt_takes_usable_first_exchanges(tmp_path):
    pairs = [
        (words(4), words(4)),
        (words(1024), words(1024, "x")),
        (words(3), words(9)),
        (words(9), words(3)),
        (words(1025), words(4)),
        (words(1000), words(1049)),
    ]
    requests = sharegpt(tmp_path, pairs, 4)
    assert (
        sorted((r.prompt_tokens, r.max_tokens) for r in requests)
        == [(4, 4)] * 2 + [(1024, 1024)] * 2
    )


def test_sharegpt_answers_may_have_a_fixed_length(tmp_path):
    requests = sharegpt(tmp_path, [(words(4), "x")], 1, output_len=2)
    assert requests == [BenchRequest(words(4), 2, prompt_tokens=4)]


def test_sharegpt_without_usable_conversation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset_path must hold a usable conversation, got none"):
        sharegpt(tmp_path, [("a", "b")], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "must hold a list of conversations, got dict"),
        ('[{"conversations": [{}, {}]}]', "entry 0 of .* is no conversation"),
        ("[7]", "entry 0 of .* is no conversation"),
    ],
)
def test_other_formats_are_refused(text, message, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        asyncio.run(datasets.sharegpt_requests(str(file), 1, rng(), count_words))
