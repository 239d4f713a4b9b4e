"""Traces of every form, and the sharing that their block ids tell of."""

import gzip
import json

import pytest
from helpers import shared_dir

from jpaged.bench.requests import MadeUpPrompts
from jpaged.bench.traces import trace_requests


def read(tmp_path, text, count=100):
    file = tmp_path / "trace"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return trace_requests(str(file), count, MadeUpPrompts(0))


def shape(requests):
    return [(r.arrival_s, r.prompt_tokens, r.max_tokens) for r in requests]


def test_csv_in_seconds(tmp_path):
    text = "arrival_s,prompt_tokens,output_tokens\n0,3,4\n1.5,5,6\n"
    requests = read(tmp_path, text)
    assert shape(requests) == [(0.0, 3, 4), (1.5, 5, 6)]
    assert [len(str(r.prompt).split()) for r in requests] == [3, 5]
    assert shape(read(tmp_path, gzip.compress(text.encode()))) == shape(requests)
    assert shape(read(tmp_path, text, count=1)) == shape(requests)[:1]


def test_burstgpt_and_azure_have_columns_of_their_own(tmp_path):
    burst = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,m,7,8,15,x\n"
    assert shape(read(tmp_path, burst)) == [(5.0, 7, 8)]
    azure = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    first, second = (r.arrival_s or 0.0 for r in read(tmp_path, azure))
    assert second - first == pytest.approx(4.314579, abs=1e-6)


def test_rows_without_tokens_are_left_out_and_the_rest_sorted(tmp_path):
    text = "arrival_s,prompt_tokens,output_tokens\n9,3,4\n1,5,0\n2,0,5\n3,1,1\n"
    assert shape(read(tmp_path, text)) == [(3.0, 1, 1), (9.0, 3, 4)]


def test_lengths_without_times(tmp_path):
    assert shape(read(tmp_path, "prompt_tokens,output_tokens\n3,4\n")) == [(None, 3, 4)]


def test_equal_block_ids_are_equal_text(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 20, "output_length": 2, "hash_ids": [1, 2, 3]},
        {"timestamp": 250, "input_length": 17, "output_length": 2, "hash_ids": [1, 2, 9]},
        {"timestamp": 300, "input_length": 8, "output_length": 2, "hash_ids": [7]},
    ]
    requests = read(tmp_path, "\n".join(map(json.dumps, rows)))
    assert [r.arrival_s for r in requests] == [0.0, 0.25, 0.3]
    first, second, third = (str(r.prompt).split() for r in requests)
    assert (len(first), len(second), len(third)) == (20, 17, 8)
    assert first[:16] == second[:16]
    assert third != first[:8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "dataset_path must hold at least one row"),
        ("a,output_tokens\n1,2\n", "must have one of the columns prompt_tokens, input_length"),
        ("prompt_tokens,x\n1,2\n", "must have one of the columns output_tokens, output_length"),
        ("prompt_tokens,output_tokens\n1,x\n", "row 1 of .* is unusable: invalid literal"),
        ("arrival_s,prompt_tokens,output_tokens\ninf,1,1\n", "arrival_s must be finite, got inf"),
        ("arrival_s,prompt_tokens,output_tokens\nsoon,1,1\n", "row 1 of .* is unusable: Invalid"),
        ("prompt_tokens,output_tokens\n0,2\n", "must hold a row with prompt and answer, got none"),
        ("{", "is not JSON lines"),
        (
            '{"input_length": 9, "output_length": 1, "hash_ids": [1]}\n'
            '{"input_length": 9, "output_length": 1, "hash_ids": [1, 2, 3]}',
            "hash_ids must stand for blocks of equal size",
        ),
    ],
)
def test_unusable_traces_are_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


@pytest.mark.skipif(shared_dir() is None, reason="the shared workloads are not there")
@pytest.mark.parametrize(
    ("name", "block_size"),
    [
        ("azure_llm_2023_conv.csv.gz", None),
        ("burstgpt1_head30.csv", None),
        ("mooncake_conversation.jsonl.gz", 512),
        ("agent_miniswe.jsonl.gz", 16),
    ],
)
def test_shared_traces_are_read(name, block_size):
    path = shared_dir() / "workloads" / "traces" / name  # pyright: ignore[reportOptionalOperand]
    requests = trace_requests(str(path), 20, MadeUpPrompts(0))
    assert len(requests) == 20
    for request in requests:
        assert len(str(request.prompt).split()) == request.prompt_tokens
    if block_size is not None:
        texts = [" ".join(str(r.prompt).split()[:block_size]) for r in requests]
        assert len(set(texts)) < len(texts)
