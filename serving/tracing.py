"""One OpenTelemetry span a request for text, sent to a collector over OTLP (HTTP).

Names of attributes are vLLM's, which are OpenTelemetry's for generative AI where there are such.
Needs the extra `otel`. The collector may be away: spans are sent by a thread, and dropped where
that fails.
"""

import contextvars
import time
from typing import TYPE_CHECKING, Any

from jpaged.outputs import RequestOutput
from jpaged.sampling_params import SamplingParams

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

TRACE_HEADERS = ("traceparent", "tracestate")
trace_headers: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar(
    "jpaged_trace_headers", default=None
)
"""Of the HTTP request at hand: the span that a client has opened."""


class RequestTracer:
    """Makes the spans.

    Args:
        endpoint: The collector's address for traces, as `http://localhost:4318/v1/traces`.
        model_name: What the model is called in spans.
        exporter: Where spans go instead.

    Raises:
        ValueError: OpenTelemetry is not installed.
    """

    def __init__(
        self, endpoint: str, model_name: str, exporter: "SpanExporter | None" = None
    ) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ValueError('otlp_traces_endpoint needs: pip install "jpaged[otel]"') from None
        # Its last spans are sent when the process ends.
        self._provider = TracerProvider(resource=Resource.create({"service.name": "jpaged"}))
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint))
        )
        self._tracer = self._provider.get_tracer("jpaged.serving")
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    def flush(self) -> None:
        """Sends what has not been sent yet."""
        self._provider.force_flush()

    def record(self, output: RequestOutput, params: SamplingParams, num_tokens: int) -> None:
        """Makes the span of a request that has ended.

        Args:
            output: Its last output, with times.
            params: Its parameters.
            num_tokens: That it has generated.
        """
        from opentelemetry.trace import SpanKind

        times = output.metrics
        if times is None:
            return
        # The engine's times are of a clock that says nothing outside of this machine.
        offset_ns = time.time_ns() - time.monotonic_ns()
        end_s = time.monotonic() if times.finished_time_s is None else times.finished_time_s
        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract(trace_headers.get() or {}),
            kind=SpanKind.SERVER,
            start_time=int(times.arrival_time_s * 1e9) + offset_ns,
            attributes=self._attributes(output, params, num_tokens, end_s),
        )
        span.end(int(end_s * 1e9) + offset_ns)

    def _attributes(
        self, output: RequestOutput, params: SamplingParams, num_tokens: int, end_s: float
    ) -> dict[str, Any]:
        times = output.metrics
        assert times is not None, "checked by the caller"
        arrival, scheduled = times.arrival_time_s, times.first_scheduled_time_s
        found: dict[str, Any] = {
            "gen_ai.request.id": output.request_id,
            "gen_ai.response.model": self._model_name,
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": len(output.prompt_token_ids),
            "gen_ai.usage.completion_tokens": num_tokens,
            "gen_ai.response.finish_reasons": [
                part.finish_reason for part in output.outputs if part.finish_reason is not None
            ],
            "gen_ai.latency.time_in_queue": None if scheduled is None else scheduled - arrival,
            "gen_ai.latency.time_to_first_token": times.time_to_first_token_s,
            "gen_ai.latency.e2e": end_s - arrival,
        }
        return {name: value for name, value in found.items() if value is not None}
