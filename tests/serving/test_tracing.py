import http.server
import sys
import threading

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.serving.tracing import RequestTracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"prompt": "the sea", "temperature": 0.5}


@pytest.fixture
def collector():
    """A collector of one's own: its address, and the spans that it has got."""
    spans = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = ExportTraceServiceRequest.FromString(_plain(body, self.headers))
            for resource in request.resource_spans:
                spans.extend(s for scope in resource.scope_spans for s in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    server.shutdown()
    thread.join()
    server.server_close()


def _plain(body, headers):
    if headers.get("Content-Encoding") != "gzip":
        return body
    import gzip

    return gzip.decompress(body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_becomes_a_span_of_its_clients_trace(make_client, collector, stream):
    endpoint, spans = collector
    client = make_client(otlp_traces_endpoint=endpoint)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    answer = client.post("/v1/completions", json=BODY | {"stream": stream}, headers=headers)
    assert answer.status_code == 200
    assert client.post("/v1/completions", json=BODY).status_code == 200
    client.app.state.service.tracer.flush()
    first, second = spans
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert second.trace_id.hex() != TRACE
    assert second.parent_span_id == b""
    assert 0 <= first.end_time_unix_nano - first.start_time_unix_nano < 60e9
    values = {pair.key: pair.value for pair in first.attributes}
    assert values["gen_ai.usage.completion_tokens"].int_value == 4
    assert values["gen_ai.request.temperature"].double_value == 0.5
    assert values["gen_ai.response.model"].string_value == "tiny"
    assert values["gen_ai.request.id"].string_value.startswith("cmpl-")


def test_without_a_collector_nothing_is_traced(client):
    assert client.app.state.service.tracer is None
    assert client.post("/v1/completions", json=BODY).status_code == 200


def test_the_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r'pip install "jpaged\[otel\]"'):
        RequestTracer("http://localhost:4318/v1/traces", "tiny")


def test_an_output_without_times_has_no_span():
    from jpaged.outputs import RequestOutput

    exporter = InMemorySpanExporter()
    tracer = RequestTracer("http://localhost:1/v1/traces", "tiny", exporter)
    params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY)
    tracer.record(RequestOutput("one", None, [1], [], finished=True), params, 0)
    tracer.flush()
    assert exporter.get_finished_spans() == ()
