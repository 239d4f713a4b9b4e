"""Lines of a batch, and its output after runs that ended well or badly."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from jpaged.serving.batch_files import BatchOutput, read_lines, unknown_ids

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


def line(**fields) -> bytes:
    return json.dumps(GOOD | fields).encode()


def result(custom_id, status=200):
    response = {"status_code": status, "request_id": "r", "body": {}}
    return {"id": "i", "custom_id": custom_id, "response": response, "error": None}


def fault(number):
    error = {"code": "invalid_line", "message": "bad", "line": number}
    return {"id": "i", "custom_id": None, "response": None, "error": error}


def lines_of(tmp_path, *raw: bytes):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"\n".join(raw))
    return read_lines(str(file))


def test_good_lines(tmp_path):
    chat = line(custom_id="ü", url="/v1/chat/completions")
    first, second = lines_of(tmp_path, b"\xef\xbb\xbf" + line(), b" \r", chat + b"\r")
    assert (first.number, first.custom_id, first.url, first.body, first.fault) == (
        1,
        "a",
        "/v1/completions",
        {"prompt": "x"},
        None,
    )
    assert (second.number, second.custom_id, second.url) == (3, "ü", "/v1/chat/completions")


BAD_LINES = [
    (b"{", "the line is not JSON: "),
    (b'{"custom_id": "\xff"}', "the line is not UTF-8: byte 15"),
    (b"[" * 100_000, "the line is not JSON: "),
    (b"[]", "the line must hold a JSON object"),
    (line(custom_id=None), "custom_id must be a non-empty string"),
    (line(custom_id=""), "custom_id must be a non-empty string"),
    (line(custom_id=7), "custom_id must be a non-empty string"),
    (line(method="GET"), 'method must be "POST"'),
    (line(url="/v1/embeddings"), "url must be one of /v1/completions, /v1/chat/completions"),
    (line(url=["x"]), "url must be one of "),
    (line(body=None), "body must be a JSON object"),
    (line(body={"stream": True}), "body.stream must be false in a batch"),
    (line(extra=1), "'extra' is not supported: a line has custom_id, method, url, body"),
]


@pytest.mark.parametrize(("raw", "message"), BAD_LINES)
def test_bad_line_costs_only_itself(tmp_path, raw, message):
    bad, good = lines_of(tmp_path, raw, line(custom_id="b"))
    assert bad.fault is not None
    assert bad.fault.startswith(message)
    assert (good.custom_id, good.fault) == ("b", None)


def test_second_use_of_an_id_is_a_bad_line(tmp_path):
    first, _, again = lines_of(tmp_path, line(), line(custom_id="b"), line())
    assert first.fault is None
    assert again.fault == "custom_id must be unique, and line 1 has the same"


@pytest.mark.parametrize("path", ["https://host/in.jsonl", "s3://bucket/in.jsonl"])
def test_remote_input_is_refused(path):
    with pytest.raises(ValueError, match="--input-file must be a file of this machine, got "):
        read_lines(path)


def test_empty_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--input-file must hold at least one request, got none"):
        lines_of(tmp_path, b"\n \n")


def test_standard_input_and_output(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(line())))
    assert [read.custom_id for read in read_lines("-")] == ["a"]
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=written))
    with BatchOutput("-") as output:
        output.write(result("ü"))
    assert json.loads(written.getvalue()) == result("ü")
    assert "ü".encode() in written.getvalue()


def test_output_is_taken_over(tmp_path):
    file = tmp_path / "out.jsonl"
    with BatchOutput(str(file)) as output:
        output.write(result("a"))
        output.write(result("b", status=400))
        output.write(fault(4))
    with BatchOutput(str(file)) as output:
        assert output.custom_ids == {"a", "b"}
        assert output.faulty_lines == {4}
        assert output.num_failed == 2
        raw = [line(), b"{", b"{", b"{", line(custom_id="c")]
        assert [output.has(read) for read in lines_of(tmp_path, *raw)] == [
            True,
            False,
            False,
            True,
            False,
        ]
        output.write(result("c"))
    assert len(file.read_text().splitlines()) == 4


@pytest.mark.parametrize("num_bytes", [1, 10, -1])
def test_torn_last_line_is_cut_off(tmp_path, num_bytes):
    file = tmp_path / "out.jsonl"
    whole = json.dumps(result("a")).encode() + b"\n"
    torn = json.dumps(result("b")).encode()
    file.write_bytes(whole + (torn[:num_bytes] if num_bytes > 0 else torn))
    with BatchOutput(str(file)) as output:
        assert output.custom_ids == {"a"}
        output.write(result("c"))
    assert [json.loads(raw)["custom_id"] for raw in file.read_text().splitlines()] == ["a", "c"]


@pytest.mark.parametrize(
    "other",
    [
        b"hello\n",
        b"\n",
        b"[]\n",
        b'{"custom_id": "a"}\n',
        b'{"custom_id": 7, "response": {"status_code": 200}, "error": null}\n',
        b'{"custom_id": "a", "response": null, "error": null}\n',
    ],
)
def test_file_of_something_else_is_left_alone(tmp_path, other):
    file = tmp_path / "out.jsonl"
    content = json.dumps(result("a")).encode() + b"\n" + other + b"torn"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"line 2 of --output-file .* is no result of a batch"):
        BatchOutput(str(file))
    assert file.read_bytes() == content


def test_two_runs_cannot_write_to_one_file(tmp_path):
    file = str(tmp_path / "out.jsonl")
    with (
        BatchOutput(file),
        pytest.raises(ValueError, match="another run writes to --output-file"),
    ):
        BatchOutput(file)
    with BatchOutput(file):
        pass


def test_results_of_another_input_are_noticed(tmp_path):
    with BatchOutput(str(tmp_path / "out.jsonl")) as output:
        output.custom_ids |= {"a", "z"}
        assert list(unknown_ids(output, lines_of(tmp_path, line()))) == ["z"]
