"""`jpaged run-batch` with the real application and a tiny model."""

import json

import pytest
import tiny_text_model

from jpaged import cli
from jpaged.async_engine import AsyncLLM
from jpaged.cli import run_batch
from jpaged.serving.in_process import InProcessEngine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_text_model.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def engines(model, monkeypatch):
    """The options of the engines that are made; all use the tiny model."""
    made = []

    def make_engine(options):
        made.append(options)
        return InProcessEngine(AsyncLLM(**tiny_text_model.options(model)))

    monkeypatch.setattr(run_batch, "make_engine", make_engine)
    return made


def row(custom_id, url="/v1/completions", **body) -> str:
    fields = {"custom_id": custom_id, "method": "POST", "url": url}
    return json.dumps(fields | {"body": {"max_tokens": 3, "temperature": 0} | body})


@pytest.fixture
def batch(tmp_path):
    """Runs the command over these rows; gives exit code and results by id."""

    def run(*rows: str, options: tuple[str, ...] = ()):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("\n".join(rows))
        code = cli.main(["run-batch", "-i", str(source), "-o", str(target), *options])
        results = [json.loads(line) for line in target.read_text().splitlines()]
        return code, {result["custom_id"]: result for result in results}

    return run


def test_rows_go_through_the_server(engines, batch, capsys):
    messages = [{"role": "user", "content": "the th"}]
    rows = [
        row("a", prompt="the th", n=2, temperature=1, seed=1),
        row("chat", "/v1/chat/completions", messages=messages, model="my-name"),
        row("bad", prompt="x", top_p=2),
        row("other", prompt="x", model="gpt-4o"),
        "{",
    ]
    code, results = batch(*rows, options=("--served-model-name", "my-name", "-m", "some-model"))
    assert code == 1
    assert engines == [{"model": "some-model"}]
    answer = results["a"]["response"]["body"]
    assert (answer["object"], answer["model"]) == ("text_completion", "my-name")
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
    assert results["a"]["response"]["request_id"] in answer["id"]
    assert results["bad"]["response"]["body"]["error"]["param"] == "top_p"
    assert results["other"]["response"]["status_code"] == 404
    assert results["chat"]["response"]["status_code"] == 400
    assert "chat_template" in results["chat"]["response"]["body"]["error"]["message"]
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("jpaged: 5 requests, 4 failed, 6 prompt tokens, 6 tokens in ")
    )


def test_chat_template_of_a_file(engines, batch, tmp_path):
    template = tmp_path / "template"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    chat = row("a", "/v1/chat/completions", messages=[{"role": "user", "content": "the th"}])
    code, results = batch(chat, options=("--chat-template", str(template)))
    assert code == 0
    body = results["a"]["response"]["body"]
    assert (body["object"], body["usage"]["prompt_tokens"]) == ("chat.completion", 6)


def test_finished_rows_are_kept(engines, batch, capsys):
    rows = [row("a", prompt="the"), row("b", prompt="in")]
    assert batch(rows[0])[0] == 0
    code, results = batch(*rows)
    assert (code, results.keys()) == (0, {"a", "b"})
    assert "2 requests, 1 kept from before" in capsys.readouterr().err
    assert batch(*rows)[0] == 0
    assert len(engines) == 2


def test_output_of_another_input_is_refused(engines, batch, capsys):
    batch(row("a", prompt="the"))
    code, results = batch(row("b", prompt="the"))
    assert (code, results.keys()) == (2, {"a"})
    assert "has results of another input (custom_id 'a')" in capsys.readouterr().err


def test_keys_of_the_environment_do_not_matter(engines, batch, monkeypatch):
    monkeypatch.setenv("JPAGED_API_KEY", "secret")
    assert batch(row("a", prompt="the"))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "https://x/in", "-o", "out"], "--input-file must be a file of this machine"),
        (["-i", "in", "-o", "s3://x/out"], "--output-file must be a file of this machine"),
        (["-i", "missing", "-o", "out"], "No such file or directory: 'missing'"),
        (["-i", "in", "-o", "./in"], "--input-file and --output-file must differ, got in twice"),
        (["-i", "in", "-o", "no/out"], "No such file or directory"),
        (["-i", "in", "-o", "out", "--enable-auto-tool-choice"], "needs tool_call_parser"),
        (["-i", "in", "-o", "out", "--chat-template", "no"], "cannot read --chat-template no"),
    ],
)
def test_mistake_is_one_line(arguments, message, engines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text(row("a", prompt="the"))
    assert cli.main(["run-batch", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("jpaged: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert engines == []
