from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

from jpaged.prompts import parse_prompt

if TYPE_CHECKING:
    from jpaged.tokenizer import Tokenizer

VOCAB_SIZE = 10


class Letters:
    """A tokenizer that knows the letters from a on, whatever the model knows."""

    def encode(self, text, add_special_tokens=True):
        return [ord(c) - ord("a") for c in text]


def _parse(prompt):
    return parse_prompt(prompt, cast("Tokenizer", Letters()), VOCAB_SIZE)


def test_text_is_tokenised_and_kept():
    parsed = _parse("abc")
    assert (parsed.token_ids, parsed.text, parsed.cache_salt) == ([0, 1, 2], "abc", None)
    assert _parse({"prompt": "abc"}) == parsed


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2],
        (1, 2),
        np.array([1, 2]),
        np.array([1, 2], np.uint8),
        [np.int64(1), np.int32(2)],
        range(1, 3),
    ],
)
def test_ids_become_a_list_of_python_integers(ids):
    for parsed in (_parse(ids), _parse({"prompt_token_ids": ids})):
        assert parsed.token_ids == [1, 2]
        assert type(parsed.token_ids) is list
        assert {type(i) for i in parsed.token_ids} == {int}
        assert parsed.text is None


def test_the_callers_list_is_copied():
    ids = [1, 2]
    assert _parse(ids).token_ids is not ids


def test_ids_count_and_their_text_is_kept_if_both_are_given():
    parsed = _parse({"prompt": "abc", "prompt_token_ids": [5], "cache_salt": "x"})
    assert (parsed.token_ids, parsed.text, parsed.cache_salt) == ([5], "abc", "x")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt must have at least 1 token, got 0"),
        ([], "prompt must have at least 1 token, got 0"),
        ({"prompt": ""}, "prompt must have at least 1 token, got 0"),
        ({}, "prompt must be text or have prompt or prompt_token_ids, got neither"),
        ({"prompt": None}, "prompt must be text or have prompt or prompt_token_ids, got neither"),
        ({"text": "a"}, r"prompt must have only the keys \['cache_salt', .*got \['text'\]"),
        ({"prompt": 5}, "prompt must be a string, got int"),
        ({"prompt": ["a"]}, "prompt must be a string, got list"),
        ("a\ud800", "prompt must be Unicode text, got a string with a lone surrogate"),
        (5, "prompt_token_ids must be a list of integers, got int"),
        (None, "prompt must be text or have prompt or prompt_token_ids, got neither"),
        (b"ab", "prompt_token_ids must be a list of integers, got bytes"),
        ({1, 2}, "prompt_token_ids must be a list of integers, got set"),
        (np.int64(5), "prompt_token_ids must be a list of integers, got int64"),
        (np.array(5), "prompt_token_ids must be a list of integers, got ndarray"),
        (["a"], "prompt_token_ids must be integers, got 'a'"),
        ([1.0], r"prompt_token_ids must be integers, got 1\.0"),
        ([True], "prompt_token_ids must be integers, got True"),
        ([[1]], r"prompt_token_ids must be integers, got \[1\]"),
        (np.array([1.5]), r"prompt_token_ids must be integers, got 1\.5"),
        (np.array([[1]]), r"prompt_token_ids must be integers, got \[1\]"),
        ({"prompt_token_ids": "ab"}, "prompt_token_ids must be integers, got 'a'"),
        ([3, 10], r"prompt_token_ids must be in \[0, 9\], got 10"),
        ([-1], r"prompt_token_ids must be in \[0, 9\], got -1"),
        ("az", r"prompt_token_ids must be in \[0, 9\], got 25"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt must be a non-empty string, got ''"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt must be a non-empty string, got 5"),
        ({"prompt": "a", "cache_salt": "\ud800"}, "cache_salt must be Unicode text"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        _parse(prompt)


def test_text_needs_a_tokenizer():
    assert parse_prompt([1], None, VOCAB_SIZE).token_ids == [1]
    with pytest.raises(ValueError, match="prompt must be token ids: this model has no tokenizer"):
        parse_prompt("abc", None, VOCAB_SIZE)
