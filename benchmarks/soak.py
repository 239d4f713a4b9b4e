"""A long run of `jpaged serve` under bad clients: nothing lost, mixed up, leaked or growing.

First an engine of this process answers a set of requests, then clients send them to a server at
random: they read to the end, leave in the middle or before the first token (which aborts the
request: HTTP knows no other way), want texts with stop strings, schemas, several continuations,
at random priorities. Whatever is read must be what the engine of this process gave, up to where
it was read. At the end the pool must be empty, and the memory of both processes what it was after
the first quarter.
"""

import argparse
import asyncio
import collections
import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.http_stream import Answer, request
from jpaged import LLM, SamplingParams

SUBJECTS = ("the sea", "a clock", "two foxes", "winter", "a long train ride", "bread", "the moon")
FORMS = (
    "Write one sentence about {}.",
    "Question: what is {}?\nAnswer:",
    "A list of facts about {}:\n-",
    "{} is",
    "Translate into French: I like {}.",
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SAMPLE_EVERY_S = 15.0
MAX_GROWTH = 1.02
"""Memory at the end over that after a quarter of the time."""
Parts = dict[int, tuple[str, list[int], str | None]]
"""By continuation: text, token ids, finish reason (None: it was not read to the end)."""


def make_cases(count: int, rng: random.Random) -> list[tuple[str, dict[str, Any]]]:
    """Prompts with sampling parameters, named alike in HTTP and in `SamplingParams`."""
    cases = []
    for seed in range(count):
        prompt = rng.choice(FORMS).format(rng.choice(SUBJECTS)) * rng.choice((1, 1, 1, 5))
        params: dict[str, Any] = {
            "seed": seed,
            "max_tokens": rng.choice((4, 16, 32, 64)),
            "temperature": rng.choice((0.0, 0.7, 1.0)),
        }
        if params["temperature"] and rng.random() < 0.2:
            params["n"] = rng.choice((2, 3))
        kind = rng.random()
        if kind < 0.25:
            params["stop"] = rng.sample((".", "\n", " the", "e", "and"), 2)
        elif kind < 0.35:
            params["structured_outputs"] = {"json": SCHEMA}
        elif kind < 0.4:
            params["structured_outputs"] = {"choice": ["yes", "no", "perhaps not today"]}
        elif kind < 0.5:
            params["top_p"] = 0.9
            params["repetition_penalty"] = 1.2
        elif kind < 0.6:
            params["ignore_eos"] = True
        cases.append((prompt, params))
    return cases


def offline(model: str | None, cases: list[tuple[str, dict[str, Any]]]) -> list[Parts]:
    """What an engine of this process answers."""
    with LLM(model, max_num_seqs=16, max_model_len=1024, compilation="lazy") as llm:
        outputs = llm.generate(
            [prompt for prompt, _ in cases], [SamplingParams(**params) for _, params in cases]
        )
    return [
        {part.index: (part.text, part.token_ids, part.finish_reason) for part in output.outputs}
        for output in outputs
    ]


@dataclasses.dataclass
class Process:
    """The server, its port and what it has written."""

    process: "subprocess.Popen[str]"
    port: int = 0
    log: collections.deque[str] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=1000)
    )

    @classmethod
    def start(cls, model: str | None) -> "Process":
        options = ["--policy", "priority", "--max-num-seqs", "16", "--max-model-len", "1024"]
        options += ["--port", "0", "--host", "127.0.0.1", "--log-level", "warning"]
        options += ["--shutdown-timeout", "30", "--disable-access-log"]
        command = [sys.executable, "-m", "jpaged", "serve", *([model] if model else []), *options]
        self = cls(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        ready = threading.Event()

        def read() -> None:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                self.log.append(line)
                if found := re.search(r"is ready at http://127.0.0.1:(\d+)", line):
                    self.port = int(found[1])
                    ready.set()
            ready.set()

        threading.Thread(target=read, daemon=True).start()
        ready.wait()
        if not self.port:
            sys.exit("the server did not start:\n" + "".join(self.log))
        return self

    def memory_mib(self) -> list[float]:
        """Resident memory of the server and of its engine."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [_resident_mib(int(found)) for found in (pid, *children)]


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


class Soak:
    """The clients and what they have seen."""

    def __init__(
        self, port: int, cases: list[tuple[str, dict[str, Any]]], expected: list[Parts]
    ) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[dict[str, Any]] = []
        self._port = port
        self._cases = cases
        self._expected = expected

    async def client(self, number: int, end_s: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < end_s:
            index = rng.randrange(len(self._cases))
            prompt, params = self._cases[index]
            body = {"prompt": prompt, **params, "priority": rng.randint(-1, 1)}
            body["return_token_ids"] = True
            manner = rng.choices(("whole", "stream", "leave", "leave early"), (20, 50, 20, 10))[0]
            try:
                found = await self._send(body, manner, rng)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                self.counts["broken"] += 1
                self.wrong.append({"case": index, "manner": manner, "error": repr(error)})
                continue
            self.counts[manner] += 1
            if found is not None:
                self._compare(index, manner, found)

    async def _send(self, body: dict[str, Any], manner: str, rng: random.Random) -> Parts | None:
        if manner == "leave early":
            sending = asyncio.create_task(self._read(body | {"stream": True}, 0))
            await asyncio.sleep(rng.random() * 0.2)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            return None
        if manner == "whole":
            async with request(self._port, "/v1/completions", body) as answer:
                return _parts_of_whole(await _checked(answer))
        return await self._read(
            body | {"stream": True}, rng.randint(1, 30) if manner == "leave" else None
        )

    async def _read(self, body: dict[str, Any], num_events: int | None) -> Parts:
        parts: Parts = {}
        async with request(self._port, "/v1/completions", body) as answer:
            if answer.status != 200:
                raise ValueError(f"{answer.status}: {await answer.read()}")
            async for event in answer.events():
                if event == b"[DONE]":
                    return parts
                chunk = json.loads(event)
                if "error" in chunk:
                    raise ValueError(f"{chunk}")
                for choice in chunk["choices"]:
                    text, ids, _ = parts.get(choice["index"], ("", [], None))
                    parts[choice["index"]] = (
                        text + choice["text"],
                        ids + (choice.get("token_ids") or []),
                        choice["finish_reason"],
                    )
                self.counts["tokens"] += 1
                if num_events is not None:
                    num_events -= 1
                    if num_events <= 0:
                        return parts
        raise ValueError("the stream ended without [DONE]")

    def _compare(self, index: int, manner: str, found: Parts) -> None:
        expected = self._expected[index]
        for number, (text, ids, reason) in found.items():
            whole_text, whole_ids, whole_reason = expected[number]
            if reason is None:
                same = whole_text.startswith(text) and whole_ids[: len(ids)] == ids
            else:
                same = (text, ids, reason) == (whole_text, whole_ids, whole_reason)
            if not same:
                self.wrong.append(
                    {
                        "case": index,
                        "manner": manner,
                        "params": self._cases[index][1],
                        "found": [text, ids, reason],
                        "expected": [whole_text, whole_ids, whole_reason],
                    }
                )
        if manner in ("whole", "stream") and found.keys() != expected.keys():
            self.wrong.append({"case": index, "manner": manner, "missing": True})


async def _checked(answer: Answer) -> dict[str, Any]:
    data = await answer.read()
    if answer.status != 200:
        raise ValueError(f"{answer.status}: {data[:300]!r}")
    return json.loads(data)


def _parts_of_whole(found: dict[str, Any]) -> Parts:
    return {
        choice["index"]: (choice["text"], choice["token_ids"], choice["finish_reason"])
        for choice in found["choices"]
    }


async def read_metrics(port: int) -> dict[str, float]:
    """The counters that have no other label than the model's name."""
    async with request(port, "/metrics", method="GET") as answer:
        text = (await answer.read()).decode()
    found = re.findall(r'^jpaged:(\w+)\{model_name="[^"]*"\} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


async def watch(server: Process, end_s: float, samples: list[dict[str, Any]]) -> None:
    """Samples memory and counters until the end."""
    while time.monotonic() < end_s:
        found = await read_metrics(server.port)
        sample = {
            "left_s": round(end_s - time.monotonic()),
            "memory_mib": [round(size, 1) for size in server.memory_mib()],
            "running": found["num_requests_running"],
            "waiting": found["num_requests_waiting"],
            "blocks_used": found["blocks_used"],
            "generated": found["generation_tokens_total"],
            "compiled_late": found["compilations_after_warmup_total"],
        }
        samples.append(sample)
        print(sample, flush=True)
        await asyncio.sleep(min(SAMPLE_EVERY_S, max(end_s - time.monotonic(), 0)))


async def run(server: Process, soak: Soak, args: argparse.Namespace) -> dict[str, Any]:
    """Runs all clients; what was seen, and what is left when they have gone."""
    end_s = time.monotonic() + 60 * args.minutes
    samples: list[dict[str, Any]] = []
    clients = [soak.client(number, end_s) for number in range(args.clients)]
    await asyncio.gather(watch(server, end_s, samples), *clients)
    after = await read_metrics(server.port)
    for _ in range(100):  # those that left last may still run for a step
        if not after["num_requests_running"] + after["num_requests_waiting"]:
            break
        after = await read_metrics(server.port)
    return {"samples": samples, "counts": dict(soak.counts), "wrong": soak.wrong, "after": after}


def main() -> int:
    parser = argparse.ArgumentParser(description="A long run of jpaged serve under bad clients")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--cases", type=int, default=150, help="different requests")
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--seed", type=int, default=0)
    common.add_output_argument(parser)
    args = parser.parse_args()
    cases = make_cases(args.cases, random.Random(args.seed))
    expected = offline(args.model, cases)
    server = Process.start(args.model)
    soak = Soak(server.port, cases, expected)
    try:
        result = asyncio.run(run(server, soak, args))
        server.process.send_signal(signal.SIGTERM)
        result["exit_code"] = server.process.wait(60)
    finally:
        server.process.kill()
    quarter = result["samples"][len(result["samples"]) // 4]["memory_mib"]
    last = result["samples"][-1]["memory_mib"]
    rows = [
        ("requests", sum(soak.counts.values()) - soak.counts["tokens"]),
        *soak.counts.items(),
        ("wrong", len(soak.wrong)),
        ("blocks used at the end", result["after"]["blocks_used"]),
        ("running at the end", result["after"]["num_requests_running"]),
        ("memory after a quarter (server, engine), MiB", quarter),
        ("memory at the end, MiB", last),
        ("exit code", result["exit_code"]),
        ("lines of the log", len(server.log)),
    ]
    common.print_table(("what", "value"), rows)
    for entry in soak.wrong[:10]:
        print(entry)
    common.write(result, args.json)
    is_flat = all(now <= MAX_GROWTH * then for now, then in zip(last, quarter, strict=True))
    is_clean = not soak.wrong and not result["after"]["blocks_used"] and not result["exit_code"]
    return 0 if is_clean and is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
