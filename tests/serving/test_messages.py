import dataclasses

import msgspec
import numpy as np
import pytest

from jpaged.beam_search import BeamToken, Hypothesis
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.sequence_end import Finish
from jpaged.serving import messages

PARAMS = (
    SamplingParams(),
    SamplingParams(
        n=3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=-(2**63),
        stop=["a", "🙂"],
        stop_token_ids=[1, 2],
        ignore_eos=True,
        max_tokens=None,
        min_tokens=2,
        logprobs=-1,
        prompt_logprobs=0,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.DELTA,
        logit_bias={3: -1.5},
        allowed_token_ids=[3, 4],
        bad_words=["x"],
    ),
    SamplingParams(detokenize=False),
    SamplingParams(
        temperature=0,
        use_beam_search=True,
        best_of=4,
        length_penalty=-1.0,
        early_stopping="never",
    ),
    SamplingParams(structured_outputs={"json": {"type": "object"}, "disable_any_whitespace": True}),
    SamplingParams(structured_outputs={"choice": ["a", "b"]}),
    SamplingParams(structured_outputs={"json_object": True}),
)


def test_every_field_is_tried():
    changed = {name for params in PARAMS for name in messages.pack_params(params)}
    assert changed == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("params", PARAMS)
def test_parameters_arrive_as_they_were(params):
    message = messages.Add(1, "a", [1, 2], messages.pack_params(params), -3, None)
    arrived = messages.decode_to_engine(messages.encode(message))
    assert isinstance(arrived, messages.Add)
    assert SamplingParams(**arrived.params) == params


def test_tokens_of_a_step_arrive_as_they_were():
    packed = messages.PackedLogprobs(-0.5, 2, b"\1\0\0\0", b"\0\0\0\0")
    step = messages.StepTokens(
        handles=[1, 2],
        seq_indices=[0, 1],
        token_ids=[5, 6],
        logprobs={1: packed},
        ends={0: Finish("stop", 5, is_end_token=True), 1: Finish("stop", "x")},
        progress=[messages.Progress(1, 1.5, None, 3, 4)],
        prompt_logprobs={1: [packed]},
        hypotheses={2: [messages.PackedHypothesis([5], [packed], -1.0, -0.5, None)]},
    )
    assert messages.decode_from_engine(messages.encode(step)) == step


def test_log_probabilities_keep_every_bit():
    values = np.array([-0.1, -7.3, -8.8], np.float32)
    token = BeamToken(5, float(values[1]), np.array([7, 5, 9], np.int32), values)
    packed = messages.pack_logprobs(token, 2)
    assert (packed.logprob, packed.rank) == (float(values[1]), 2)
    np.testing.assert_array_equal(packed.top_token_ids, [7, 5])
    np.testing.assert_array_equal(packed.top_logprobs, values[:2])
    assert len(messages.pack_logprobs(token, -1).top_token_ids) == 3


def test_a_hypothesis_keeps_its_ranks_where_they_are_wanted():
    values = np.array([-0.1, -7.3], np.float32)
    token = BeamToken(5, float(values[1]), np.array([7, 5], np.int32), values)
    hypothesis = Hypothesis([token], -7.3, -3.0, "stop")
    wanted = SamplingParams(temperature=0, use_beam_search=True, logprobs=0)
    found = messages.unpack_hypothesis(messages.pack_hypothesis(hypothesis, wanted))
    assert [token.rank for token in found.tokens] == [2]
    plain = SamplingParams(temperature=0, use_beam_search=True)
    found = messages.unpack_hypothesis(messages.pack_hypothesis(hypothesis, plain))
    assert (found.token_ids, found.score, found.finish_reason) == ([5], -3.0, "stop")
    assert not len(found.tokens[0].top_token_ids)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\xa3Add\x01\x02", b"\x92\xa5Abort\xa1x"])
def test_what_is_no_message_is_not_decoded(data):
    with pytest.raises(msgspec.DecodeError):
        messages.decode_to_engine(data)
