"""One engine over two hosts: two processes of two CPU devices, JAX's own collectives between them.

They answer as one process of one device does, and when one of them ends the other does too.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_text_model

from jpaged import LLM, BeamSearchParams, SamplingParams

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240  # never waited for unless a test fails
PROMPTS: list[list[int]] = [[5, 9, 40, 3, 77], list(range(3, 20)), [8] * 11]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, logprobs=2, ignore_eos=True)
SAMPLES = SamplingParams(temperature=1.0, seed=7, max_tokens=6, n=2, ignore_eos=True)
PENALTIES = SamplingParams(
    temperature=0.8,
    seed=8,
    top_p=0.9,
    max_tokens=8,
    repetition_penalty=1.3,
    logit_bias={5: 2.0},
    ignore_eos=True,
)
DIGITS = SamplingParams(temperature=0.0, max_tokens=12, structured_outputs={"regex": "[0-9]{5}"})
LONG = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)

FOLLOW = """
import json, sys
from jpaged import EngineConfig
from jpaged.multihost import follow
follow(EngineConfig(**json.loads(sys.argv[1])))
"""


def answers(llm: LLM) -> dict[str, Any]:
    """What an engine says to requests of every kind, and how often it swapped."""
    found: dict[str, Any] = {}
    outputs = llm.generate(PROMPTS, [GREEDY, SAMPLES, PENALTIES], use_tqdm=False)
    found["tokens"] = [[part.token_ids for part in output.outputs] for output in outputs]
    logprobs = outputs[0].outputs[0].logprobs or []
    found["logprobs"] = [one.logprob for top in logprobs for one in top.values()]
    beams = llm.beam_search(PROMPTS[:1], BeamSearchParams(beam_width=2, max_tokens=4))
    found["beams"] = [beam.tokens for beam in beams[0].sequences]
    found["digits"] = llm.generate(PROMPTS[:1], DIGITS, use_tqdm=False)[0].outputs[0].text
    crowd = llm.generate([[40, *range(3, 20)], [41, *range(3, 20)]], LONG, use_tqdm=False)
    found["crowd"] = [output.outputs[0].token_ids for output in crowd]
    found["num_swaps"] = llm.stats().scheduler.num_swaps
    return found


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    model = tiny_text_model.write_model(tmp_path_factory.mktemp("m") / "m", num_hidden_layers=1)
    # Two sequences of 48 tokens need more blocks than there are.
    return {
        "model": model,
        "dtype": "float32",
        "max_num_seqs": 2,
        "max_num_batched_tokens": 16,
        "max_model_len": 80,
        "max_logprobs": 4,
        "block_size": 8,
        "num_blocks": 11,
        "preemption_mode": "swap",
        "compilation": "lazy",
    }


class Hosts:
    """The processes of a test, each with a log; those that are left at its end are killed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.port = _two_free_ports()
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> "subprocess.Popen[bytes]":
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            # Compiled quickly: the steps are few and small.
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2 "
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
            ),
        }
        with self.log(len(self.processes)).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *command], env=env, cwd=ROOT, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def log(self, index: int) -> Path:
        return self._directory / f"{index}.log"

    def wait_for_line(self, index: int, text: str) -> None:
        """Returns when a process has written this."""
        ends_s = time.monotonic() + TIMEOUT_S
        while text not in self.log(index).read_text(errors="replace"):
            assert self.processes[index].poll() is None, self.logs()
            assert time.monotonic() < ends_s, self.logs()
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n----\n".join(
            self.log(i).read_text(errors="replace")[-4000:] for i in range(len(self.processes))
        )

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def hosts(tmp_path):
    found = Hosts(tmp_path)
    yield found
    found.close()


def _two_free_ports() -> int:
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
            return port


def _of_hosts(port: int, rank: int) -> dict[str, Any]:
    return {
        "tensor_parallel_size": 4,
        "nnodes": 2,
        "node_rank": rank,
        "master_addr": "127.0.0.1",
        "master_port": port,
    }


def test_two_hosts_answer_as_one_device_until_one_of_them_is_gone(options, hosts):
    for rank, command in enumerate(([__file__], ["-c", FOLLOW])):
        hosts.start(*command, json.dumps(options | _of_hosts(hosts.port, rank)))
    with LLM(**options) as llm:
        expected = answers(llm)
    assert expected["num_swaps"] > 0
    hosts.wait_for_line(0, "goes on")
    line = next(line for line in hosts.log(0).read_text().splitlines() if line.startswith("{"))
    found = json.loads(line)
    assert found.pop("logprobs") == pytest.approx(expected.pop("logprobs"), abs=1e-4)
    assert found == expected
    leader, follower = hosts.processes
    follower.kill()
    assert leader.wait(TIMEOUT_S) == 1, hosts.logs()
    assert "RuntimeError: the host of rank 1 (127.0.0.1) is gone" in hosts.log(0).read_text()


@pytest.mark.parametrize(("ended_by", "codes"), [(signal.SIGINT, (0, 0)), (signal.SIGKILL, None)])
def test_a_server_ends_with_its_followers(ended_by, codes, options, hosts):
    flags = ["-m", "jpaged", "serve", options["model"], "--host", "127.0.0.1", "--port", "0"]
    for rank in range(2):
        others = _of_hosts(hosts.port, rank) | {"num_blocks": 11, "compilation": "lazy"}
        given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in others.items()]
        hosts.start(*flags, *(part for flag in given for part in flag))
    leader, follower = hosts.processes
    hosts.wait_for_line(0, "is ready at")
    hosts.wait_for_line(1, "follows the host of rank 0")
    leader.send_signal(ended_by)
    found = leader.wait(TIMEOUT_S), follower.wait(TIMEOUT_S)
    if codes is not None:
        assert found == codes, hosts.logs()
    else:
        assert found[1] != 0, hosts.logs()


def _lead() -> None:
    with LLM(**json.loads(sys.argv[1])) as llm:
        print(json.dumps(answers(llm)), flush=True)
        print("goes on", flush=True)
        while True:
            llm.generate(PROMPTS[:1], ENDLESS, use_tqdm=False)


if __name__ == "__main__":
    _lead()
