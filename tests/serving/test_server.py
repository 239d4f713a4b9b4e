"""The server as people run it: two processes, signals, exit codes, what is written."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_text_model

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120  # never waited for unless a test fails
LONG = {"prompt": "hello", "max_tokens": 110, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_text_model.write_model(tmp_path_factory.mktemp("m") / "m")


class Server:
    """`jpaged serve` in a process of its own; `log` is what it has written."""

    def __init__(self, model, *arguments, stderr=subprocess.PIPE, port=0):
        self.log = ""
        self._connections = []
        self.port = port
        options = {
            "--dtype": "float32",
            "--max-num-seqs": "4",
            "--max-num-batched-tokens": "32",
            "--block-size": "8",
            "--num-blocks": "80",
            "--compilation": "lazy",
            "--host": "127.0.0.1",
            "--port": str(port),
        }
        flat = [text for pair in options.items() for text in pair]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jpaged", "serve", model, *flat, *arguments],
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            cwd=ROOT,
        )
        self._ready = threading.Event()
        if stderr is subprocess.PIPE:
            self._reader = threading.Thread(target=self._read)
            self._reader.start()

    def _read(self):
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if found := re.search(r"is ready at http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                self._ready.set()
        self._ready.set()

    def wait_ready(self):
        assert self._ready.wait(TIMEOUT_S)
        assert self.port, self.log
        return self

    def request(self, method, path, body=None):
        return self._send(method, path, body).getresponse()

    def begin(self, body):
        """A request for text, whose answer is not waited for."""
        return self._send("POST", "/v1/completions", body)

    def _send(self, method, path, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        self._connections.append(connection)
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, body and json.dumps(body), headers)
        return connection

    def wait_open(self, count):
        """Waits until the server works on so many requests for text."""
        while json.loads(self.request("GET", "/load").read())["server_load"] < count:
            time.sleep(0.01)

    def stream(self, **fields):
        """An answer that has begun to come."""
        response = self.request("POST", "/v1/completions", LONG | {"stream": True} | fields)
        assert response.status == 200
        assert response.readline().startswith(b"data: ")
        return response

    @property
    def engine_pid(self):
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        (pid,) = children.split()
        return int(pid)

    def end(self):
        """Waits for the process and returns its exit code."""
        code = self.process.wait(TIMEOUT_S)
        for connection in self._connections:
            connection.close()
        if self.process.stderr is not None:
            self._reader.join(TIMEOUT_S)
            self.process.stderr.close()
        return code


@pytest.fixture
def serve(model):
    servers = []

    def start(*arguments, **options):
        servers.append(Server(model, *arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        with contextlib.suppress(ProcessLookupError):
            server.process.kill()
        server.end()


def test_sigterm_lets_open_requests_finish(serve):
    server = serve("--shutdown-timeout", str(TIMEOUT_S)).wait_ready()
    answers = [server.stream() for _ in range(3)]
    server.process.send_signal(signal.SIGTERM)
    for answer in answers:
        text = answer.read().decode()
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in text
    assert server.end() == 0
    assert "Traceback" not in server.log


def test_sigint_without_a_timeout_aborts_open_requests(serve):
    server = serve("--shutdown-timeout", "0").wait_ready()
    engine = server.engine_pid
    os.kill(engine, signal.SIGSTOP)
    waiting = [server.begin(LONG) for _ in range(3)]
    server.wait_open(3)
    server.process.send_signal(signal.SIGINT)
    answers = [connection.getresponse() for connection in waiting]
    assert [answer.status for answer in answers] == [503] * 3
    assert "the server ended this request" in answers[0].read().decode()
    os.kill(engine, signal.SIGCONT)
    assert server.end() == 0
    assert "Traceback" not in server.log


def test_a_second_signal_ends_it_at_once(serve):
    server = serve("--shutdown-timeout", str(10 * TIMEOUT_S)).wait_ready()
    answer = server.stream()
    os.kill(server.engine_pid, signal.SIGSTOP)  # it would never end by itself
    server.process.send_signal(signal.SIGTERM)
    while "Shutting down" not in server.log:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    answer.close()


def test_a_killed_engine_ends_the_server(serve):
    server = serve().wait_ready()
    engine = server.engine_pid
    os.kill(engine, signal.SIGSTOP)
    waiting = [server.begin(LONG | {"stream": stream}) for stream in (True, False)]
    server.wait_open(2)
    os.kill(engine, signal.SIGKILL)
    for connection in waiting:
        assert b"the engine has ended" in connection.getresponse().read()
    assert server.request("GET", "/health").status == 503
    assert server.end() == 1
    assert "was ended by signal 9" in server.log
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)


def test_sigterm_while_the_engine_starts_ends_both(serve):
    server = serve()
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    while not children.read_text().split():
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def test_a_bad_model_is_one_line_and_exit_code_2():
    server = Server("/nowhere")
    assert server.end() == 2
    assert server.log.startswith("jpaged: error: model must be an existing directory")
    assert server.log.count("\n") == 1


def test_a_port_in_use_is_told_before_the_engine_starts(serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = serve(port=port)
        assert server.end() == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in server.log


def test_a_full_disk_for_logs_does_not_matter(serve):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open("/dev/full", "w") as full:
        server = serve("--log-level", "trace", stderr=full, port=port)
    while True:
        try:
            answer = server.request("POST", "/v1/completions", LONG)
            break
        except ConnectionRefusedError:
            assert server.process.poll() is None
            time.sleep(0.05)
    assert answer.status == 200
    assert json.loads(answer.read())["choices"][0]["finish_reason"] == "length"
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def test_logs_as_json_have_no_prompt(serve):
    server = serve("--log-format", "json", "--log-level", "debug").wait_ready()
    body = LONG | {"prompt": "swordfish"}
    server.request("POST", "/v1/completions", body).read()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert {"time", "level", "logger", "message"} <= lines[0].keys()
    assert [line for line in lines if "POST /v1/completions 200" in line["message"]]
    assert "swordfish" not in server.log
