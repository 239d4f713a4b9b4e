"""Where a host stands, as it was told or as its TPU VM tells it."""

import http.server
import threading

import pytest

from jpaged import EngineConfig
from jpaged.multihost import location
from jpaged.multihost.location import Location, locate

TWO = EngineConfig(nnodes=2, tensor_parallel_size=2)
_VARIABLES = ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """No TPU VM around, and a metadata server that answers nothing."""
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(location, "_METADATA", "http://127.0.0.1:9/")


def test_what_is_given_holds(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    config = EngineConfig(
        nnodes=2, tensor_parallel_size=2, node_rank=1, master_addr="host", master_port=77
    )
    assert locate(config) == Location(1, "host", 77)


@pytest.mark.parametrize(
    "variables",
    [
        {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc"},
        {"TPU_WORKER_ID": "1", "TPU_PROCESS_ADDRESSES": "t-0.svc:8476,t-1.svc:8476"},
    ],
)
def test_a_pod_is_told_by_its_environment(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert locate(TWO) == Location(1, "t-0.svc", TWO.master_port)


@pytest.mark.parametrize("workers", ["10.0.0.4,10.0.0.5", "a:b:10.0.0.4,a:b:10.0.0.5"])
def test_a_tpu_vm_is_told_by_its_metadata_server(workers, monkeypatch):
    answers = {"/agent-worker-number": "1", "/worker-network-endpoints": workers}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            is_known = self.headers["Metadata-Flavor"] == "Google" and self.path in answers
            self.send_response(200 if is_known else 403)
            self.end_headers()
            self.wfile.write(answers.get(self.path, "").encode())

        def log_message(self, format, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(location, "_METADATA", f"http://127.0.0.1:{server.server_port}/")
        try:
            assert locate(TWO) == Location(1, "10.0.0.4", TWO.master_port)
        finally:
            server.shutdown()
            thread.join()


def test_elsewhere_both_must_be_given():
    with pytest.raises(ValueError, match="nnodes above 1 needs node_rank and master_addr where no"):
        locate(TWO)


def test_a_slice_of_another_size_is_refused(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    with pytest.raises(ValueError, match=r"nnodes must be the 4 hosts of this TPU slice.*got 2"):
        locate(TWO)
