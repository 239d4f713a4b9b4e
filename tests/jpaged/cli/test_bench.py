"""`jpaged bench serve` against a small server."""

import json

import pytest
from fake_openai import FakeOpenAI, listening

from jpaged import cli
from jpaged.bench import serve


@pytest.fixture(scope="module")
def server():
    fake = FakeOpenAI()
    with listening(fake.app) as fake.base_url:
        yield fake


@pytest.fixture
def bench(server):
    """Runs the command against the server with few and short requests."""
    server.bodies.clear()
    server.headers.clear()
    defaults = ["--num-prompts", "6", "--random-input-len", "8", "--random-output-len", "3"]

    def run(*arguments: str) -> int:
        command = ["bench", "serve", "--base-url", server.base_url, "--disable-tqdm"]
        return cli.main([*command, *defaults, *arguments])

    return run


def custom_file(tmp_path, *prompts) -> list[str]:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    count = str(len(prompts))
    return ["--dataset-name", "custom", "--dataset-path", str(file), "--num-prompts", count]


def test_table_and_result(bench, server, tmp_path, capsys):
    file = tmp_path / "deep" / "result.json"
    options = ["--save-result", str(file), "--save-detailed", "--metric-percentiles", "50,99.9"]
    goodput = ["--goodput", "ttft:60000", "e2el:60000", "--metadata", "who=me"]
    assert bench(*options, *goodput) == 0
    captured = capsys.readouterr()
    assert "Successful requests                              6" in captured.out
    assert "P99.9 TTFT (ms)" in captured.out
    assert captured.err == f"jpaged: result in {file}\n"
    result = json.loads(file.read_text())
    assert (result["completed"], result["failed"], result["model_id"]) == (6, 0, "fake-model")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (48, 18)
    assert result["request_goodput"] == result["request_throughput"] > 0
    assert (result["request_rate"], result["who"]) == ("inf", "me")
    assert result["generated_texts"] == ["w0 w1 w2 "] * 6
    assert [len(gaps) for gaps in result["itls"]] == [2] * 6
    assert 0 < result["mean_ttft_ms"] <= result["mean_e2el_ms"]
    assert len({body["prompt"] for body in server.bodies}) == 6


def test_body_has_what_was_asked_for(bench, server):
    fields = ["--temperature", "0", "--top-k", "5", "--ignore-eos", "--extra-body", '{"seed": 7}']
    assert bench(*fields, "--api-key", "secret", "--header", "x-a=b=c", "-m", "other") == 0
    body, headers = server.bodies[0], server.headers[0]
    del body["prompt"]
    assert body == {
        "model": "other",
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "top_k": 5,
        "ignore_eos": True,
        "seed": 7,
    }
    assert (headers["authorization"], headers["x-a"]) == ("Bearer secret", "b=c")


@pytest.mark.parametrize(
    "options", [["--backend", "openai-chat"], ["--endpoint", "/v1/chat/completions"]]
)
def test_chat(bench, server, options, tmp_path):
    file = tmp_path / "result.json"
    assert bench(*options, "--save-result", str(file), "--save-detailed") == 0
    (message,) = server.bodies[0]["messages"]
    assert message["role"] == "user"
    assert len(message["content"].split()) == 8
    result = json.loads(file.read_text())
    assert result["generated_texts"] == ["w0 w1 w2 "] * 6
    # The event that only tells the role is no token.
    assert [len(gaps) for gaps in result["itls"]] == [2] * 6


def test_prompts_of_token_ids(bench, server):
    assert bench("--prompt-token-ids", "--vocab-size", "100") == 0
    assert all(type(token) is int and token < 100 for token in server.bodies[0]["prompt"])


def test_failures_are_counted_shown_and_cost_the_exit_code(bench, server, tmp_path, capsys):
    file = tmp_path / "result.json"
    prompts = ["fine", "REFUSE", "REFUSE again", "BREAK", "CUT"]
    assert bench(*custom_file(tmp_path, *prompts), "--save-result", str(file)) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[:3] == [
        "jpaged: failed: 2 x HTTP 400: top_p must be in (0, 1]",
        "jpaged: failed: 1 x ValueError: error in the stream: the engine has ended",
        "jpaged: failed: 1 x ValueError: the stream ended before data: [DONE]",
    ]
    result = json.loads(file.read_text())
    assert (result["completed"], result["failed"]) == (1, 4)


def test_open_requests_are_limited(bench, tmp_path):
    file = tmp_path / "result.json"
    assert bench("--max-concurrency", "2", "--save-result", str(file)) == 0
    assert json.loads(file.read_text())["max_concurrent_requests"] <= 2


def test_warm_up_does_not_count(bench, server, tmp_path, capsys):
    assert bench("--num-warmups", "3") == 0
    assert len(server.bodies) == 9
    assert "Successful requests                              6" in capsys.readouterr().out
    assert bench(*custom_file(tmp_path, "REFUSE"), "--num-warmups", "1") == 2
    assert "jpaged: error: warm-up failed: 1 x HTTP 400" in capsys.readouterr().err


def test_trace_is_cut_to_what_the_model_has_room_for(bench, server, tmp_path, capsys):
    file = tmp_path / "trace.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n0,5,2\n0.1,2047,2\n0.2,6,1\n")
    trace = ["--dataset-name", "trace", "--dataset-path", str(file), "--request-rate", "1000"]
    assert bench(*trace) == 0
    assert [len(body["prompt"].split()) for body in server.bodies] == [5, 6]
    assert capsys.readouterr().err == (
        "jpaged: 1 of 3 requests of the trace are longer than the model's 2048 tokens and left "
        "out\n"
    )
    file.write_text("arrival_s,prompt_tokens,output_tokens\n0,5000,2\n")
    assert bench(*trace) == 2
    assert "dataset_path has no request of at most 2048 tokens" in capsys.readouterr().err


def test_sharegpt_lengths_come_from_the_server(bench, server, tmp_path):
    file = tmp_path / "sharegpt.json"
    turns = [{"value": "a b c d e"}, {"value": "f g h i"}]
    file.write_text(json.dumps([{"conversations": turns}]))
    dataset = ["--dataset-name", "sharegpt", "--dataset-path", str(file), "--num-prompts", "2"]
    assert bench(*dataset) == 0
    asked = [(body["prompt"], body["max_tokens"]) for body in server.bodies]
    assert asked == [("a b c d e", 4)] * 2


def test_rates_are_sent(bench):
    assert bench("--request-rate", "2000", "--burstiness", "0.5") == 0
    ramp = ["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1000"]
    assert bench(*ramp, "--ramp-up-end-rps", "3000") == 0


def test_server_that_starts_late_is_waited_for(bench, server, monkeypatch, capsys):
    monkeypatch.setattr(serve, "_RETRY_S", 0.001)
    server.num_model_failures = 2
    assert bench("--ready-check-timeout-sec", "60") == 0
    server.num_model_failures = 1
    assert bench() == 2
    assert "/v1/models answered HTTP 503: starting" in capsys.readouterr().err


def test_name_of_the_result_is_made_up(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench("--save-result", "--request-rate", "5000") == 0
    assert len(list(tmp_path.glob("openai-5000.0qps-*.json"))) == 1
    assert bench("--save-result", "--result-dir", "r", "--result-filename", "x.json") == 0
    assert json.loads((tmp_path / "r" / "x.json").read_text())["completed"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-prompts", "0"], "num_prompts must be at least 1, got 0"),
        (["--max-concurrency", "0"], "max_concurrency must be at least 1, got 0"),
        (["--num-warmups", "-1"], "num_warmups must be at least 0, got -1"),
        (["--request-rate", "0"], "request_rate must be above 0, got 0.0"),
        (["--dataset-name", "trace"], "--dataset-name trace needs --dataset-path"),
        (["--dataset-path", "x"], "--dataset-path needs --dataset-name custom, sharegpt or trace"),
        (["--ramp-up-start-rps", "1"], "need --ramp-up-strategy"),
        (["--ramp-up-strategy", "linear"], "needs --ramp-up-start-rps and --ramp-up-end-rps"),
        (["--metric-percentiles", "x"], "metric_percentiles must be like 50,90,99, got 'x'"),
        (["--metric-percentiles", "101"], "metric_percentiles must be in [0, 100], got '101'"),
        (["--percentile-metrics", "x"], "must be of ttft, tpot, itl, e2el, got 'x'"),
        (["--goodput", "itl:3"], "goodput must name one of ttft, tpot, e2el, got 'itl:3'"),
        (["--goodput", "ttft"], "goodput must be like ttft:200 (in ms), got 'ttft'"),
        (["--goodput", "ttft:-1"], "goodput must be above 0 ms, got 'ttft:-1'"),
        (["--extra-body", "{"], "extra_body must be JSON"),
        (["--extra-body", "[]"], "extra_body must be a JSON object, got '[]'"),
        (["--extra-body", '{"stream": 1}'], "extra_body must not set stream: the benchmark does"),
        (["--header", "x"], "header must be like NAME=VALUE, got 'x'"),
        (["--save-detailed"], "need --save-result"),
        (["--save-result", "/dev/null/x"], "cannot write --save-result /dev/null/x"),
        (["--save-result", "x", "--metadata", "y"], "metadata must be like NAME=VALUE, got 'y'"),
        (["--prompt-token-ids", "--backend", "openai-chat"], "need --endpoint /v1/completions"),
        (["--endpoint", "/nothing", "--model", "m", "--num-warmups", "1"], "HTTP 404"),
    ],
)
def test_mistake_is_one_line_on_stderr(bench, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_messages_need_the_chat_endpoint(bench, tmp_path, capsys):
    file = tmp_path / "in.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert bench("--dataset-name", "custom", "--dataset-path", str(file)) == 2
    assert "messages need --endpoint /v1/chat/completions" in capsys.readouterr().err


def test_no_server_is_one_line(capsys):
    assert cli.main(["bench", "serve", "--host", "::1", "--port", "1"]) == 2
    assert capsys.readouterr().err.startswith(
        "jpaged: error: http://[::1]:1/v1/models: cannot connect: "
    )


def test_help_explains_the_datasets(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["bench", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: jpaged bench [options] serve")
    assert "hash_ids of shared blocks" in text
