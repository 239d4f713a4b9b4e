"""Batches run through an application, however it answers and ends."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from jpaged.errors import EngineDeadError
from jpaged.serving.batch import run_batch
from jpaged.serving.batch_files import BatchOutput, read_lines

ROOT = Path(__file__).parents[2]


class FakeApp:
    """Answers with the prompt, later the longer it is; some prompts make it fail."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.num_open = 0
        self.most_open = 0
        self.is_dead = False
        self.app = Starlette(routes=[Route("/v1/completions", self._answer, methods=["POST"])])

    async def _answer(self, request: Any) -> JSONResponse:
        prompt = (await request.json())["prompt"]
        self.prompts.append(prompt)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        for _ in prompt:
            await asyncio.sleep(0)
        self.num_open -= 1
        headers = {"X-Request-Id": f"id-{prompt}"}
        if prompt == "refuse":
            return JSONResponse({"error": {"message": "no"}}, 400, headers)
        if prompt in ("fail", "die"):
            self.is_dead = prompt == "die"
            return JSONResponse({"error": {"message": "internal"}}, 500, headers)
        usage = {"prompt_tokens": 2, "completion_tokens": 3}
        return JSONResponse({"text": prompt, "usage": usage}, headers=headers)

    async def check_health(self) -> None:
        if self.is_dead:
            raise EngineDeadError("the engine has ended")


@pytest.fixture
def fake():
    return FakeApp()


@pytest.fixture
def batch(fake, tmp_path):
    """Runs a batch of these prompts and gives its counts and results."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def run(*prompts: str | None, concurrency: int = 4) -> Any:
        rows = [
            "{"
            if prompt is None
            else json.dumps(
                {
                    "custom_id": f"c-{prompt}",
                    "method": "POST",
                    "url": "/v1/completions",
                    "body": {"prompt": prompt},
                }
            )
            for prompt in prompts
        ]
        source.write_text("\n".join(rows))
        with BatchOutput(str(target)) as output:
            return asyncio.run(
                run_batch(fake.app, fake, read_lines(str(source)), output, concurrency=concurrency)
            )

    run.results = lambda: [  # pyright: ignore[reportFunctionMemberAccess]
        json.loads(row) for row in target.read_text().splitlines()
    ]
    return run


def test_results_have_openais_form(batch):
    counts = batch("x", "refuse", None)
    assert (counts.num_run, counts.num_failed) == (3, 2)
    assert (counts.num_prompt_tokens, counts.num_tokens) == (2, 3)
    results = {result["custom_id"]: result for result in batch.results()}
    assert all(result.pop("id").startswith("batch_req_") for result in results.values())
    usage = {"prompt_tokens": 2, "completion_tokens": 3}
    assert results["c-x"] == {
        "custom_id": "c-x",
        "response": {
            "status_code": 200,
            "request_id": "id-x",
            "body": {"text": "x", "usage": usage},
        },
        "error": None,
    }
    assert results["c-refuse"]["response"]["status_code"] == 400
    assert results["c-refuse"]["error"] is None
    assert results[None]["response"] is None
    error = results[None]["error"]
    assert (error["code"], error["line"]) == ("invalid_line", 3)
    assert error["message"].startswith("line 3: the line is not JSON")


def test_results_come_as_they_finish(batch):
    batch("a long prompt" * 20, "b", "cc")
    assert [result["custom_id"][:3] for result in batch.results()] == ["c-b", "c-c", "c-a"]


def test_open_requests_are_limited(batch, fake):
    batch(*(f"p{i}" for i in range(20)), concurrency=3)
    assert fake.most_open == 3
    assert len(batch.results()) == 20


def test_second_run_goes_on(batch, fake):
    batch("a", "refuse", None)
    counts = batch("a", "refuse", None, "b")
    assert (counts.num_run, counts.num_failed) == (1, 0)
    assert fake.prompts == ["a", "refuse", "b"]
    assert len(batch.results()) == 4


def test_failure_inside_is_a_result_while_the_engine_lives(batch):
    counts = batch("fail", "b")
    assert counts.num_failed == 1
    assert len(batch.results()) == 2


def test_dead_engine_ends_the_run_without_a_result(batch):
    with pytest.raises(EngineDeadError, match="the engine has ended"):
        batch("a", "die", "b", concurrency=1)
    assert [result["custom_id"] for result in batch.results()] == ["c-a"]


def test_full_disk_ends_the_run(batch, monkeypatch):
    def fail(self, result):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BatchOutput, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        batch("a", "b")


_KILLED = """\
import asyncio, os, signal, sys
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from jpaged.serving.batch import run_batch
from jpaged.serving.batch_files import BatchOutput, read_lines

async def answer(request):
    if (await request.json())["prompt"] == "p3":
        os.kill(os.getpid(), signal.SIGKILL)
    return JSONResponse({"usage": {"prompt_tokens": 1, "completion_tokens": 1}})

app = Starlette(routes=[Route("/v1/completions", answer, methods=["POST"])])
with BatchOutput(sys.argv[2]) as output:
    asyncio.run(run_batch(app, None, read_lines(sys.argv[1]), output, concurrency=1))
"""


def test_killed_run_leaves_a_file_to_go_on_with(batch, fake, tmp_path):
    prompts = [f"p{i}" for i in range(6)]
    rows = [
        {"custom_id": f"c-{p}", "method": "POST", "url": "/v1/completions", "body": {"prompt": p}}
        for p in prompts
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    done = subprocess.run([sys.executable, "-c", _KILLED, *files], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [result["custom_id"] for result in batch.results()] == ["c-p0", "c-p1", "c-p2"]
    batch(*prompts)
    assert fake.prompts == ["p3", "p4", "p5"]
    assert sorted(result["custom_id"] for result in batch.results()) == [f"c-{p}" for p in prompts]
