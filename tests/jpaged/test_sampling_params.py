import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from jpaged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.min_tokens) == (1, 16, 0)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert params.repetition_penalty == 1.0
    assert params.presence_penalty == params.frequency_penalty == 0.0
    assert params.seed is params.logprobs is params.prompt_logprobs is None
    assert params.detokenize
    assert params.skip_special_tokens
    assert params.spaces_between_special_tokens
    assert not params.ignore_eos
    assert not params.include_stop_str_in_output
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert params.logit_bias is params.allowed_token_ids is None
    assert params.stop == params.stop_token_ids == params.bad_words == ()


def test_values_are_normalised():
    params = SamplingParams(
        stop="end",
        stop_token_ids=[3, 3, np.int64(4)],  # pyright: ignore[reportArgumentType]
        allowed_token_ids=iter([1, 2]),  # pyright: ignore[reportArgumentType]
        bad_words=["a", "b", "a"],
        temperature=1,
        top_k=np.int32(5),  # pyright: ignore[reportArgumentType]
        logit_bias={np.int64(7): 1},  # pyright: ignore[reportArgumentType]
        output_kind="delta",  # pyright: ignore[reportArgumentType]
    )
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert params.allowed_token_ids == (1, 2)
    assert params.bad_words == ("a", "b")
    assert type(params.temperature) is float
    assert type(params.top_k) is int
    assert params.logit_bias == {7: 1.0}
    assert params.output_kind is RequestOutputKind.DELTA


def test_equal_params_are_interchangeable():
    params = SamplingParams(stop=["x"], logit_bias={1: 2.0})
    assert params == SamplingParams(stop="x", logit_bias={1: 2})
    assert hash(params) == hash(SamplingParams(stop="x", logit_bias={1: 2}))
    assert params != SamplingParams(stop="y", logit_bias={1: 2})
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, n=2).n == 2
    assert "stop=('x',)" in repr(params)


def test_params_cannot_be_changed():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert params.logit_bias == {1: 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_none_and_empty_mean_nothing_is_asked():
    params = SamplingParams(
        stop=None,  # pyright: ignore[reportArgumentType]
        stop_token_ids=None,  # pyright: ignore[reportArgumentType]
        bad_words=None,  # pyright: ignore[reportArgumentType]
        max_tokens=None,
        logit_bias={},
    )
    assert params == SamplingParams(max_tokens=None)


def test_seed_minus_one_is_no_seed():
    assert SamplingParams(seed=-1) == SamplingParams()
    assert SamplingParams(seed=-(2**63)).seed == -(2**63)


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False)])
def test_small_temperature_is_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).is_greedy is greedy


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match="top_a"):
        SamplingParams(top_a=2)  # pyright: ignore[reportCallIssue]


REFUSED = [
    ({"n": 0}, r"n must be at least 1, got 0"),
    ({"n": 1.0}, r"n must be an integer, at least 1, got 1.0"),
    ({"n": True}, r"n must be an integer, at least 1, got True"),
    ({"n": "2"}, r"n must be an integer, at least 1, got '2'"),
    ({"n": 2, "temperature": 0}, r"n must be 1 with greedy sampling .*, got 2"),
    ({"temperature": -0.1}, r"temperature must be a finite number >= 0, got -0.1"),
    ({"temperature": float("nan")}, r"temperature must be a finite number >= 0, got nan"),
    ({"temperature": float("inf")}, r"temperature must be a finite number >= 0, got inf"),
    ({"temperature": 10**400}, r"temperature must be a finite number >= 0, got 10000"),
    ({"temperature": "1"}, r"temperature must be a number, .*, got '1'"),
    ({"temperature": None}, r"temperature must be a number, .*, got None"),
    ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
    ({"top_p": 1.01}, r"top_p must be in \(0, 1\], got 1.01"),
    ({"top_k": -2}, r"top_k must be 0 or -1 \(all tokens\) or at least 1, got -2"),
    ({"top_k": 1.5}, r"top_k must be an integer, .*, got 1.5"),
    ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
    ({"min_p": 1.1}, r"min_p must be in \[0, 1\], got 1.1"),
    ({"presence_penalty": 2.1}, r"presence_penalty must be in \[-2, 2\], got 2.1"),
    ({"frequency_penalty": -2.1}, r"frequency_penalty must be in \[-2, 2\], got -2.1"),
    ({"repetition_penalty": 0}, r"repetition_penalty must be a finite number > 0, got 0"),
    ({"max_tokens": 0}, r"max_tokens must be at least 1, or None, got 0"),
    ({"max_tokens": -5}, r"max_tokens must be at least 1, or None, got -5"),
    ({"min_tokens": -1}, r"min_tokens must be at least 0, got -1"),
    ({"min_tokens": 17}, r"min_tokens must be at most max_tokens=16, got 17"),
    ({"logprobs": -2}, r"logprobs must be at least 0, -1 \(all tokens\) or None, got -2"),
    ({"logprobs": True}, r"logprobs must be an integer, .*, got True"),
    ({"prompt_logprobs": -2}, r"prompt_logprobs must be at least 0, .*, got -2"),
    (
        {"seed": 2**63},
        r"seed must be in \[-2\*\*63, 2\*\*63 - 1\] or None, got 9223372036854775808",
    ),
    ({"seed": 0.5}, r"seed must be an integer, .*, got 0.5"),
    ({"stop": ""}, r"stop must not hold empty strings, got \[''\]"),
    ({"stop": ["a", ""]}, r"stop must not hold empty strings, got \['a', ''\]"),
    ({"stop": [1]}, r"stop must hold strings only, got 1"),
    ({"stop": 1}, r"stop must be a list of strings, got 1"),
    ({"stop": [["a"]]}, r"stop must hold strings only, got \['a'\]"),
    ({"stop": "\ud800"}, r"stop must hold Unicode text, got '\\ud800'"),
    ({"stop": "a", "detokenize": False}, r"stop needs detokenize=True, got detokenize=False"),
    ({"stop_token_ids": 5}, r"stop_token_ids must be a list of token ids, got 5"),
    ({"stop_token_ids": "5"}, r"stop_token_ids must be a list of token ids, got '5'"),
    ({"stop_token_ids": [-1]}, r"stop_token_ids must hold integers >= 0 only, got -1"),
    ({"stop_token_ids": [True]}, r"stop_token_ids must hold integers >= 0 only, got True"),
    ({"allowed_token_ids": []}, r"allowed_token_ids must be None or not empty, got an empty list"),
    ({"allowed_token_ids": ["1"]}, r"allowed_token_ids must hold integers >= 0 only, got '1'"),
    ({"bad_words": "a"}, r"bad_words must be a list of strings, got 'a'"),
    ({"bad_words": [""]}, r"bad_words must not hold empty strings, got \[''\]"),
    ({"bad_words": [{}]}, r"bad_words must hold strings only, got {}"),
    ({"bad_words": [" "]}, r"bad_words must not hold blank strings, got \(' ',\)"),
    ({"logit_bias": [1]}, r"logit_bias must map token ids to numbers, got \[1\]"),
    ({"logit_bias": {"1": 1.0}}, r"logit_bias must have integers >= 0 as token ids, got '1'"),
    ({"logit_bias": {-1: 1.0}}, r"logit_bias must have integers >= 0 as token ids, got -1"),
    (
        {"logit_bias": {1: 101}},
        r"logit_bias must have values in \[-100, 100\], got 101 for token 1",
    ),
    ({"logit_bias": {1: float("nan")}}, r"logit_bias must have values in .*, got nan for token 1"),
    ({"ignore_eos": 1}, r"ignore_eos must be True or False, got 1"),
    ({"output_kind": "all"}, r"output_kind must be one of cumulative, delta, .*, got 'all'"),
    ({"use_beam_search": 1}, r"use_beam_search must be True or False, got 1"),
    ({"best_of": 2}, r"best_of needs use_beam_search=True, got 2"),
    ({"length_penalty": 0.5}, r"length_penalty needs use_beam_search=True, got 0.5"),
    ({"early_stopping": True}, r"early_stopping needs use_beam_search=True, got True"),
    ({"early_stopping": "always"}, r'early_stopping must be True, False or "never", got .*'),
    ({"early_stopping": 1}, r'early_stopping must be True, False or "never", got 1'),
]
BEAMS = {"use_beam_search": True, "temperature": 0, "best_of": 4}
REFUSED_WITH_BEAMS = [
    ({"temperature": 1}, r"temperature must be 0 with use_beam_search=True, got 1.0"),
    ({"n": 5}, r"n must be at most best_of=4 \(the beam width\), got 5"),
    ({"best_of": 0}, r"best_of must be at least 1, or None, got 0"),
    ({"best_of": 2.0}, r"best_of must be an integer, .*, got 2.0"),
    ({"length_penalty": 6}, r"length_penalty must be in \[-5, 5\], got 6"),
    ({"length_penalty": float("nan")}, r"length_penalty must be in \[-5, 5\], got nan"),
    ({"output_kind": "delta"}, r'output_kind must be "final_only" or "cumulative" with .*"delta"'),
    ({"presence_penalty": 1}, r"presence_penalty does not work with use_beam_search=True, got 1"),
    ({"frequency_penalty": 1}, r"frequency_penalty does not work with .*, got 1.0"),
    ({"repetition_penalty": 2}, r"repetition_penalty does not work with .*, got 2.0"),
    ({"min_tokens": 1}, r"min_tokens does not work with .*, got 1"),
    ({"stop": "a"}, r"stop does not work with .*, got \('a',\)"),
    ({"logit_bias": {1: 1}}, r"logit_bias does not work with .*, got {1: 1.0}"),
    ({"allowed_token_ids": [1]}, r"allowed_token_ids does not work with .*, got \(1,\)"),
    ({"bad_words": ["a"]}, r"bad_words does not work with .*, got \('a',\)"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(ValueError, match="^" + message):
        SamplingParams(**fields)


@pytest.mark.parametrize(("fields", "message"), REFUSED_WITH_BEAMS)
def test_what_beam_search_cannot_do_is_refused(fields, message):
    with pytest.raises(ValueError, match="^" + message):
        SamplingParams(**(BEAMS | fields))


def test_beams_are_as_many_as_best_of_says():
    assert SamplingParams(n=3).num_seqs == 3
    assert SamplingParams(**BEAMS, n=3).num_seqs == 4
    assert SamplingParams(n=3, use_beam_search=True, temperature=0).num_seqs == 3


def test_end_tokens_are_the_models_and_the_callers():
    assert SamplingParams(stop_token_ids=[5, 2]).end_token_ids((1, 2)) == (1, 2, 5)
    assert SamplingParams(stop_token_ids=[5], ignore_eos=True).end_token_ids((1, 2)) == (5,)


def test_beam_search_params_become_sampling_params():
    params = BeamSearchParams(beam_width=3, max_tokens=7, length_penalty=0.5, early_stopping=True)
    assert params.sampling_params() == SamplingParams(
        n=3,
        best_of=3,
        use_beam_search=True,
        temperature=0,
        max_tokens=7,
        length_penalty=0.5,
        early_stopping=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 0}, r"beam_width must be an integer, at least 1, got 0"),
        ({"beam_width": True}, r"beam_width must be an integer, at least 1, got True"),
        ({"max_tokens": None}, r"max_tokens must be an integer, at least 1, got None"),
        ({"temperature": 0.7}, r"temperature must be 0 with use_beam_search=True, got 0.7"),
        ({"length_penalty": "1"}, r"length_penalty must be a number, .*, got '1'"),
        ({"early_stopping": None}, r'early_stopping must be True, False or "never", got None'),
        ({"ignore_eos": 0}, r"ignore_eos must be True or False, got 0"),
    ],
)
def test_bad_beam_search_params_are_refused(fields, message):
    with pytest.raises(ValueError, match="^" + message):
        BeamSearchParams(**({"beam_width": 2, "max_tokens": 8} | fields))


LIMITS: dict[str, Any] = {"vocab_size": 100, "max_logprobs": 20, "max_num_seqs": 8}


@pytest.mark.parametrize(
    ("fields", "limits", "message"),
    [
        ({"n": 9}, {}, r"n must be at most max_num_seqs=8, got 9"),
        (
            {"stop_token_ids": [100]},
            {},
            r"stop_token_ids must hold token ids in \[0, 99\], got 100",
        ),
        ({"allowed_token_ids": [1, 200]}, {}, r"allowed_token_ids must hold .*, got 200"),
        ({"logit_bias": {300: 1}}, {}, r"logit_bias must hold token ids in \[0, 99\], got 300"),
        ({"logprobs": 21}, {}, r"logprobs must be at most max_logprobs=20, got 21"),
        ({"logprobs": -1}, {}, r"logprobs must be at most max_logprobs=20, got -1 \(all 100 tok"),
        ({"prompt_logprobs": 21}, {}, r"prompt_logprobs must be at most max_logprobs=20, got 21"),
        ({"logprobs": 101}, {"max_logprobs": -1}, r"logprobs must be at most max_logprobs=100"),
        ({"logprobs": 101}, {"max_logprobs": 200}, r"logprobs must be at most max_logprobs=100"),
        ({"logprobs": 0}, {"max_logprobs": 0}, r"logprobs must be None where max_logprobs=0"),
        (BEAMS | {"best_of": 9}, {}, r"best_of must be at most max_num_seqs=8, got 9"),
        (
            BEAMS,
            {"max_logprobs": 5, "eos_token_ids": (1, 2)},
            r"best_of \(the beam width\) must be at most 3, which is max_logprobs=5 less 2 end tok",
        ),
        (BEAMS, {"max_logprobs": 0}, r"best_of \(the beam width\) must be at most 0, .*, got 4"),
        (BEAMS, {"vocab_size": 3}, r"best_of \(the beam width\) must be at most 3, .*, got 4"),
    ],
)
def test_what_the_model_or_engine_cannot_do_is_refused(fields, limits, message):
    params = SamplingParams(**fields)
    with pytest.raises(ValueError, match="^" + message):
        params.validate(**(LIMITS | limits))


def test_what_is_possible_is_accepted():
    SamplingParams(
        n=8, stop_token_ids=[99], allowed_token_ids=[0], logit_bias={99: -100}, logprobs=20
    ).validate(**LIMITS)
    SamplingParams(logprobs=-1).validate(vocab_size=100, max_logprobs=-1)
    SamplingParams(**BEAMS).validate(vocab_size=100, max_logprobs=6, eos_token_ids=(1, 2))
    SamplingParams(prompt_logprobs=-1).validate(vocab_size=100, max_logprobs=100)
