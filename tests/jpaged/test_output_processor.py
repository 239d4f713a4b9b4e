import itertools
from dataclasses import dataclass

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from jpaged.output_processor import RequestOutputs
from jpaged.outputs import CompletionOutput, RequestOutput
from jpaged.request import Request, SequenceStatus
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.sequence_end import SequenceEnd
from jpaged.tokenizer import Tokenizer

EOS = "<eos>"
_byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def spell(text: str) -> str:
    """A text as a byte-level vocabulary spells it: one character a byte."""
    return _byte_level.pre_tokenize_str(text)[0][0]


SMILE = spell("🙂")


def make_tokenizer(pieces):
    """A tokenizer whose tokens are these pieces (as `spell` gives them), and EOS."""
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, EOS]))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], fuse_unk=False))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    return Tokenizer(backend, eos_token_ids=(vocab[EOS],))


@dataclass
class Logprobs:
    """What a step reports of a position."""

    logprob: float = -0.5
    rank: int = 2
    top_token_ids: tuple[int, ...] = (0, 1)
    top_logprobs: tuple[float, ...] = (-0.1, -2.0)


class Run:
    """A request whose tokens the test chooses; ends sequences as the engine does."""

    def __init__(self, pieces, max_tokens=100, **params):
        self.tokenizer = make_tokenizer(pieces)
        self.params = SamplingParams(
            max_tokens=max_tokens, **{"temperature": 1.0, "seed": 1} | params
        )
        (eos,) = self.tokenizer.eos_token_ids
        self.request = Request("r", [eos], self.params, eos_token_ids=(eos,))
        for seq in self.request.sequences:
            seq.max_length = 1 + max_tokens
        self.outputs = RequestOutputs(self.request, self.params, self.tokenizer)

    def id(self, piece: str) -> int:
        token_id = self.tokenizer.token_to_id(piece)
        assert token_id is not None
        return token_id

    def feed(self, *pieces: str, index: int = 0) -> RequestOutput | None:
        """Samples tokens, as long as the sequence goes on, and returns what is told then."""
        seq = self.request.sequences[index]
        for piece in pieces:
            assert not seq.is_finished, "fed after its end"
            seq.token_ids.append(self.id(piece))
            logprobs = None if self.params.logprobs is None else Logprobs()
            finish = SequenceEnd(seq, self.params).check(seq.token_ids[-1])
            finish = self.outputs.sequences[index].append(seq.token_ids[-1], logprobs, finish)
            if finish is not None:
                self.end(finish.reason, finish.stop_reason, index)
        return self.outputs.output()

    def end(self, reason, stop_reason=None, index=0):
        seq = self.request.sequences[index]
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        self.request.unfinished.remove(seq)

    def abort(self) -> RequestOutput | None:
        for seq in list(self.request.unfinished):
            self.end("abort", index=seq.seq_index)
        return self.outputs.output()


def only(output: RequestOutput | None) -> CompletionOutput:
    assert output is not None
    (completion,) = output.outputs
    return completion


def run_all(pieces, max_tokens=100, **params) -> CompletionOutput:
    """Feeds all pieces up to the end, and returns what is told last."""
    run = Run(pieces, max_tokens, **params)
    output = None
    for piece in pieces:
        output = run.feed(piece)
        if run.request.is_finished:
            break
    return only(output)


def ended(completion: CompletionOutput):
    return completion.text, completion.finish_reason, completion.stop_reason


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        pytest.param(["one", "STOP", "x"], "STOP", "one", id="a_token_of_its_own"),
        pytest.param(["oneS", "T", "OPx"], "STOP", "one", id="across_three_tokens"),
        pytest.param(["S", "T", "O", "P"], "STOP", "", id="from_the_start"),
        pytest.param(["aSTOPb", "c"], "STOP", "a", id="inside_a_token"),
        pytest.param(["SSTO", "SSTOP"], "STOP", "SSTOS", id="after_false_starts"),
        pytest.param(["aXbY"], ["Y", "X"], "a", id="the_earliest_in_the_text_wins"),
        pytest.param(["ab", "cd"], ["d", "bc"], "a", id="the_earliest_across_a_border"),
        pytest.param([spell("é"), SMILE[:2], SMILE[2:]], "🙂", "é", id="a_split_character"),
    ],
)
def test_stop_string_ends_the_text_before_it(pieces, stop, text):
    completion = run_all(pieces, stop=stop)
    assert completion.text == text
    assert completion.finish_reason == "stop"
    assert completion.stop_reason in ([stop] if isinstance(stop, str) else stop)


def test_the_stop_string_that_was_found_is_told():
    assert run_all(["aXbY"], stop=["Y", "X"]).stop_reason == "X"


def test_stop_string_is_kept_if_asked_but_nothing_after_it():
    completion = run_all(["oneS", "TOPx"], stop="STOP", include_stop_str_in_output=True)
    assert ended(completion) == ("oneSTOP", "stop", "STOP")


def test_tokens_of_the_stop_string_stay_in_the_ids():
    completion = run_all(["one", "S", "TOP"], stop="STOP")
    assert len(completion.token_ids) == 3


def test_text_that_may_become_a_stop_string_is_held_back():
    run = Run(["ab", "cS", "T", "x", EOS], stop=["STOP"], output_kind=RequestOutputKind.DELTA)
    told = [only(run.feed(piece)).text for piece in ("ab", "cS", "T", "x")]
    assert told == ["", "a", "b", "c"], "always three characters behind"
    last = only(run.feed(EOS))
    assert ended(last) == ("STx", "stop", None)


def test_nothing_is_held_back_if_the_stop_string_is_kept():
    run = Run(
        ["abS"],
        stop=["STOP"],
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.CUMULATIVE,
    )
    assert only(run.feed("abS")).text == "abS"


_texts = st.text("abS", min_size=1, max_size=12)


@given(
    pieces=st.lists(st.text("abS", min_size=1, max_size=4), min_size=1, max_size=8),
    stop=st.lists(_texts.filter(lambda s: len(s) <= 4), min_size=1, max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 4),
)
def test_streamed_text_adds_up_to_what_a_search_of_the_whole_text_finds(
    pieces, stop, include, min_tokens
):
    min_tokens = min(min_tokens, len(pieces))
    expected, num_tokens = "".join(pieces), len(pieces)
    for count in range(1, len(pieces) + 1):
        before, text = "".join(pieces[: count - 1]), "".join(pieces[:count])
        # A stop string counts if it ends in this token's text.
        found = [
            (at, -i, s)
            for i, s in enumerate(dict.fromkeys(stop))
            for at in range(len(text))
            if text.startswith(s, at) and at + len(s) > len(before)
        ]
        if found and count >= min_tokens:
            at = min(at for at, *_ in found)
            first = next(s for s in dict.fromkeys(stop) if (at, s) in {(f[0], f[2]) for f in found})
            expected, num_tokens = text[:at] + (first if include else ""), count
            break
    params = {"stop": stop, "include_stop_str_in_output": include, "min_tokens": min_tokens}
    deltas = Run(pieces, len(pieces), output_kind=RequestOutputKind.DELTA, **params)
    wholes = Run(pieces, len(pieces), output_kind=RequestOutputKind.CUMULATIVE, **params)
    text, token_ids = "", []
    for piece in pieces[:num_tokens]:
        delta = only(deltas.feed(piece))
        text += delta.text
        token_ids += delta.token_ids
        whole = only(wholes.feed(piece))
        assert whole.text == text
        assert whole.token_ids == token_ids
        assert expected.startswith(text), "what was told is never taken back"
    assert text == expected
    assert deltas.request.is_finished


def test_eos_ends_and_is_no_part_of_the_text():
    completion = run_all(["a", EOS])
    assert ended(completion) == ("a", "stop", None)
    assert len(completion.token_ids) == 2


def test_eos_is_ignored_if_asked():
    run = Run(["a", EOS, "b"], max_tokens=3, ignore_eos=True, skip_special_tokens=False)
    assert ended(only(run.feed("a", EOS, "b"))) == (f"a{EOS}b", "length", None)


def test_eos_is_text_where_stops_and_special_tokens_are_kept():
    completion = run_all(["a", EOS], include_stop_str_in_output=True, skip_special_tokens=False)
    assert completion.text == f"a{EOS}"


@pytest.mark.parametrize("include", [False, True])
def test_text_of_a_stop_token_is_left_out_unless_asked_for(include):
    run = Run(["a", "b"], stop_token_ids=[1], include_stop_str_in_output=include)
    assert ended(only(run.feed("a", "b"))) == ("ab" if include else "a", "stop", run.id("b"))


def test_stops_before_min_tokens_do_not_end_the_text():
    run = Run(["X", "a", "b"], min_tokens=3, stop=["X"], stop_token_ids=[2])
    assert run.feed("X", "a") is not None
    assert not run.request.is_finished
    assert ended(only(run.feed("b"))) == ("Xa", "stop", run.id("b"))


def test_a_stop_string_that_ends_before_min_tokens_is_not_found_later():
    run = Run(["X", "a", "b"], min_tokens=2, stop=["X"])
    run.feed("X", "a", "b")
    assert not run.request.is_finished
    assert ended(only(run.feed("X"))) == ("Xab", "stop", "X")


def test_length_ends_at_max_tokens():
    assert ended(run_all(["a", "b", "c"], max_tokens=2)) == ("ab", "length", None)


def test_a_stop_at_the_last_token_counts_as_stop():
    assert ended(run_all(["a", "X"], max_tokens=2, stop="X")) == ("a", "stop", "X")


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize(
    ("last", "reason"), [("", "length"), (EOS, "stop"), ("b", "stop"), ("", "abort")]
)
def test_half_a_character_at_the_end_is_told_whatever_ends_the_text(kind, last, reason):
    pieces = ["a", SMILE[:2], "b"]
    max_tokens = 2 if reason == "length" else 9
    run = Run(pieces, max_tokens, stop_token_ids=[2], output_kind=kind)
    told = [run.feed("a"), run.feed(SMILE[:2])]
    if reason == "abort":
        told.append(run.abort())
    elif last:
        told.append(run.feed(last))
    completions = [only(output) for output in told if output is not None]
    assert completions[-1].finish_reason == reason
    is_delta = kind is RequestOutputKind.DELTA
    text = "".join(c.text for c in completions) if is_delta else completions[-1].text
    assert text == "a\N{REPLACEMENT CHARACTER}"


def test_half_a_character_after_a_stop_string_is_not_told():
    half = SMILE[:2]  # the detokenizer holds back the whole token that ends with it
    assert ended(run_all(["aX" + half, SMILE[2:]], stop="X")) == ("a", "stop", "X")
    assert ended(run_all(["aX" + half], 1, stop="X")) == ("a", "stop", "X")
    assert ended(run_all(["aX" + half, EOS], stop="X")) == ("a", "stop", "X")
    run = Run(["aX" + half], stop="X")
    run.feed("aX" + half)
    assert ended(only(run.abort())) == ("a", "abort", None)


def test_held_back_text_is_told_on_abort():
    run = Run(["abc"], stop="STOP", output_kind=RequestOutputKind.DELTA)
    assert only(run.feed("abc")).text == ""
    assert ended(only(run.abort())) == ("abc", "abort", None)


def test_a_request_aborted_before_its_first_token_tells_so():
    for kind in RequestOutputKind:
        completion = only(Run(["a"], output_kind=kind).abort())
        assert ended(completion) == ("", "abort", None)
        assert completion.token_ids == []


def test_without_detokenizing_there_are_ids_only():
    run = Run(["a", "b", EOS], detokenize=False)
    completion = only(run.feed("a", "b", EOS))
    assert ended(completion) == ("", "stop", None)
    assert len(completion.token_ids) == 3


def test_delta_tells_each_token_once_and_only_what_is_new():
    run = Run(["a", "b", EOS], n=2, output_kind=RequestOutputKind.DELTA)
    first = only(run.feed("a", "b"))
    assert (first.index, first.text, len(first.token_ids)) == (0, "ab", 2)
    second = only(run.feed("b", index=1))
    assert (second.index, second.text) == (1, "b"), "index 0 has nothing new"
    assert run.outputs.output() is None
    third = only(run.feed(EOS, index=1))
    assert (third.index, third.text, third.finish_reason) == (1, "", "stop")
    fourth = run.feed("a", index=0)
    assert only(fourth).index == 0, "what has ended is told once"
    last = run.feed(EOS, index=0)
    assert last is not None
    assert last.finished
    assert only(last).finish_reason == "stop"


def test_cumulative_tells_all_sequences_each_time():
    run = Run(["a", "b", EOS], n=2, output_kind=RequestOutputKind.CUMULATIVE)
    first = run.feed("a")
    assert first is not None
    assert [(c.index, c.text) for c in first.outputs] == [(0, "a"), (1, "")]
    run.feed("b", EOS, index=1)
    last = run.feed("b", EOS)
    assert last is not None
    assert [(c.text, c.finish_reason) for c in last.outputs] == [("ab", "stop"), ("b", "stop")]
    assert last.finished


def test_final_only_tells_once_when_all_sequences_have_ended():
    run = Run(["a", "b", EOS], n=2, output_kind=RequestOutputKind.FINAL_ONLY)
    assert run.feed("a", EOS) is None
    assert run.feed("b", index=1) is None
    last = run.feed(EOS, index=1)
    assert last is not None
    assert last.finished
    assert [c.text for c in last.outputs] == ["a", "b"]


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_logprobs_go_with_their_tokens(kind):
    pieces = ["a", "b", "c"]
    run = Run(pieces, 3, logprobs=1, output_kind=kind)
    told = [only(run.feed("a")), only(run.feed("b", "c"))]
    sizes = [1, 2] if kind is RequestOutputKind.DELTA else [1, 3]
    for completion, size in zip(told, sizes, strict=True):
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids) == size
        for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
            assert token_id in entry
    assert told[-1].cumulative_logprob == pytest.approx(-1.5)


@pytest.mark.parametrize(("asked", "ids"), [(0, [2]), (1, [2, 0]), (2, [2, 0, 1]), (-1, [2, 0, 1])])
def test_logprobs_hold_the_token_and_the_most_likely_ones(asked, ids):
    run = Run(["a", "b", "c"], logprobs=asked)
    completion = only(run.feed("c"))
    assert completion.logprobs is not None
    (entry,) = completion.logprobs
    assert list(entry) == ids, "the token itself first"
    assert (entry[2].logprob, entry[2].rank, entry[2].decoded_token) == (-0.5, 2, "c")
    for rank, token_id in enumerate(ids[1:], 1):
        assert (entry[token_id].rank, entry[token_id].decoded_token) == (rank, "ab"[rank - 1])


def test_a_token_among_the_most_likely_ones_is_named_once():
    completion = only(Run(["a", "b"], logprobs=2).feed("b"))
    assert completion.logprobs is not None
    assert list(completion.logprobs[0]) == [1, 0]


def test_prompt_logprobs_have_a_place_a_token():
    run = Run(["a", "b"], prompt_logprobs=1)
    run.request.prompt_token_ids[:] = [0, 1]
    outputs = RequestOutputs(run.request, run.params, run.tokenizer)
    outputs.add_prompt_logprobs(1, Logprobs())
    assert outputs.prompt_logprobs is not None
    first, second = outputs.prompt_logprobs
    assert first is None
    assert second is not None
    assert list(second) == [1, 0]


def test_times_and_preemptions_are_told():
    run = Run(["a"], max_tokens=2)
    run.request.sequences[0].num_preemptions = 2
    run.outputs.note_token()
    first = run.feed("a")
    assert first is not None
    metrics = first.metrics
    assert metrics is not None
    assert metrics.num_preemptions == 2
    assert metrics.time_to_first_token_s is not None
    run.outputs.note_token()
    run.feed("a")
    times = [metrics.arrival_time_s, metrics.first_token_time_s, metrics.finished_time_s]
    assert all(a <= b for a, b in itertools.pairwise(t for t in times if t is not None))
    assert None not in times
