"""What Prometheus reads: vLLM's names with the prefix `jpaged:`, and what is jpaged's own.

Two sources: the engine's counters, asked for when somebody reads (`refresh`), and what each output
tells (`observe`). Own registry, nothing global.
"""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jpaged.errors import EngineDeadError
from jpaged.outputs import RequestMetrics, RequestOutput
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.serving.engine import EngineClient, EngineInfo
from jpaged.serving.messages import STEP_TOKEN_BOUNDS

_PREFIX = "jpaged:"
_ANSWER_TIMEOUT_S = 1.0
"""An engine that compiles or runs a long step answers late; its last counters are told then."""
_MAX_OPEN = 100_000
_SHORT_TIMES = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0),
)
_LONG_TIMES = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0),
)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_NUM_SEQS = (1, 2, 5, 10, 20)

# Name, meaning, path in the engine's counters.
_GAUGES = (
    ("num_requests_running", "Requests that run.", "scheduler.num_running"),
    ("num_requests_waiting", "Requests that wait, preempted ones too.", "scheduler.num_waiting"),
    ("num_requests_swapped", "Sequences swapped out to the host.", "scheduler.num_swapped"),
    ("blocks_total", "Blocks of the pool.", "scheduler.blocks.num_blocks"),
    ("blocks_used", "Blocks that sequences own.", "scheduler.blocks.used"),
    ("blocks_free", "Blocks that can be handed out.", "scheduler.blocks.free"),
    ("blocks_cached", "Blocks that can be found by content.", "scheduler.blocks.cached"),
    ("blocks_shared", "Blocks with several owners.", "scheduler.blocks.shared"),
    ("blocks_saved", "Blocks more that sharing spares.", "scheduler.blocks.saved"),
    ("slots_wasted", "Slots of used blocks without a token.", "scheduler.blocks.wasted_slots"),
    ("host_blocks_used", "Blocks on the host that are owned.", "scheduler.blocks.host_used"),
)
_COUNTERS = (
    ("prompt_tokens", "Tokens of prompts.", "num_prompt_tokens"),
    ("generation_tokens", "Generated tokens.", "num_generated_tokens"),
    ("num_preemptions", "Preempted sequences.", "scheduler.num_preemptions"),
    (
        "prefix_cache_queries",
        "Tokens looked up in the prefix cache.",
        "scheduler.blocks.prefix_queried_tokens",
    ),
    ("prefix_cache_hits", "Those that were found.", "scheduler.blocks.prefix_hit_tokens"),
    ("admission_rejections", "Requests refused by a full queue.", "num_rejected_reqs"),
    ("steps", "Steps of the engine.", "scheduler.num_steps"),
    ("blocks_copied", "Blocks copied when written.", "scheduler.blocks.copies"),
    ("blocks_evicted", "Cached blocks handed out again.", "scheduler.blocks.evictions"),
    ("blocks_swapped_out", "Blocks copied to the host.", "scheduler.blocks.swapped_out"),
    ("blocks_swapped_in", "Blocks copied from the host.", "scheduler.blocks.swapped_in"),
    ("tokens_discarded", "Tokens sampled after an end.", "num_discarded_tokens"),
    (
        "compilations_after_warmup",
        "Programs compiled because a step needed them.",
        "num_compilations_after_warmup",
    ),
)


OnEnd = Callable[[RequestOutput, SamplingParams, int], None]


@dataclasses.dataclass(slots=True)
class _Open:
    """What was seen of an unfinished request."""

    last_time_s: float
    num_tokens: int = 0


class Metrics:
    """The metrics of one server.

    Args:
        engine: Whose counters are told.
        model_name: Value of the label; the last part of the model's name if None.
        on_end: Told the last output of a request, its parameters and its number of tokens.
    """

    def __init__(
        self,
        engine: EngineClient,
        model_name: str | None = None,
        on_end: OnEnd | None = None,
    ) -> None:
        name = model_name or Path(engine.info.model).name
        self._engine = engine
        self._on_end = on_end
        self._registry = CollectorRegistry(auto_describe=False)
        self._counters = _EngineCounters(engine.info, name)
        self._registry.register(self._counters)
        self._model_name = name
        self._open: collections.OrderedDict[str, _Open] = collections.OrderedDict()
        self._success = Counter(
            f"{_PREFIX}request_success",
            "Requests that have ended, by reason.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _LONG_TIMES
        )
        self._between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between tokens of streamed answers.", _SHORT_TIMES
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean of a request.", _SHORT_TIMES
        )
        self._times = {
            name: self._histogram(f"{name}_seconds", help_text, _LONG_TIMES)
            for name, help_text in (
                ("e2e_request_latency", "From arrival to the end."),
                ("request_queue_time", "From arrival to the first step."),
                ("request_prefill_time", "From the first step to the first token."),
                ("request_decode_time", "From the first token to the end."),
                ("request_inference_time", "From the first step to the end."),
            )
        }
        self._numbers = {
            name: self._histogram(name, help_text, bounds)
            for name, help_text, bounds in (
                ("request_prompt_tokens", "Tokens of a prompt.", _COUNTS),
                ("request_generation_tokens", "Generated tokens of a request.", _COUNTS),
                ("request_params_n", "Continuations asked for.", _NUM_SEQS),
                ("request_params_max_tokens", "max_tokens of a request.", _COUNTS),
                ("request_num_preemptions", "Preemptions of a request.", (0, 1, 2, 5, 10)),
            )
        }

    async def refresh(self) -> None:
        """Asks the engine for its counters; keeps the last ones if it does not answer soon."""
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                self._counters.stats = await self._engine.stats()
        except (TimeoutError, EngineDeadError):
            return

    def render(self) -> tuple[bytes, str]:
        """All metrics as text, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def observe(self, output: RequestOutput, params: SamplingParams) -> None:
        """Takes an output of a request; each once, in order."""
        request_id, times = output.request_id, output.metrics
        if times is None:
            return
        seen = self._open.get(request_id)
        if seen is None:
            seen = self._open[request_id] = _Open(time.monotonic())
            if times.time_to_first_token_s is not None:
                self._first_token.observe(times.time_to_first_token_s)
            if len(self._open) > _MAX_OPEN:  # of clients that left there is no last output
                self._open.popitem(last=False)
            is_first = True
        else:
            is_first = False
        num_told = 0
        for part in output.outputs:
            num_told += len(part.token_ids)
        is_delta = params.output_kind is RequestOutputKind.DELTA
        num_new = num_told if is_delta else num_told - seen.num_tokens
        seen.num_tokens += num_new
        if not is_first and num_new > 0:
            now = time.monotonic()
            # Tokens that came together share the time since the last ones.
            share = (now - seen.last_time_s) * len(output.outputs) / num_new
            seen.last_time_s = now
            for _ in range(num_new):
                self._between_tokens.observe(share)
        if output.finished:
            del self._open[request_id]
            self._observe_end(output, params, times, seen.num_tokens)
            if self._on_end is not None:
                self._on_end(output, params, seen.num_tokens)

    def _observe_end(
        self, output: RequestOutput, params: SamplingParams, times: RequestMetrics, num_tokens: int
    ) -> None:
        reason = output.outputs[0].finish_reason if output.outputs else "abort"
        self._success.labels(self._model_name, reason).inc()
        numbers = self._numbers
        numbers["request_prompt_tokens"].observe(len(output.prompt_token_ids))
        numbers["request_generation_tokens"].observe(num_tokens)
        numbers["request_params_n"].observe(params.n)
        numbers["request_num_preemptions"].observe(times.num_preemptions)
        if params.max_tokens is not None:
            numbers["request_params_max_tokens"].observe(params.max_tokens)
        arrival, scheduled = times.arrival_time_s, times.first_scheduled_time_s
        first, end = times.first_token_time_s, times.finished_time_s
        for name, start, stop in (
            ("e2e_request_latency", arrival, end),
            ("request_queue_time", arrival, scheduled),
            ("request_prefill_time", scheduled, first),
            ("request_decode_time", first, end),
            ("request_inference_time", scheduled, end),
        ):
            if start is not None and stop is not None:
                self._times[name].observe(stop - start)
        num_following = num_tokens / max(params.n, 1) - 1
        if first is not None and end is not None and num_following > 0:
            self._per_token.observe((end - first) / num_following)

    def _histogram(self, name: str, help_text: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"{_PREFIX}{name}", help_text, ("model_name",), registry=self._registry, buckets=bounds
        )
        return histogram.labels(self._model_name)


class _EngineCounters(Collector):
    """The engine's counters as they were when it was last asked."""

    def __init__(self, info: EngineInfo, model_name: str) -> None:
        self.stats: Mapping[str, Any] = {}
        self._info = info
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        labels, names = [self._model_name], ["model_name"]
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, help_text, path in table:
                value = _at(self.stats, path)
                if value is not None:
                    family = kind(f"{_PREFIX}{name}", help_text, labels=names)
                    family.add_metric(labels, value)
                    yield family
        yield from self._usage(labels, names)
        yield self._cache_config()

    def _usage(self, labels: list[str], names: list[str]) -> Iterator[Metric]:
        used = _at(self.stats, "scheduler.blocks.used")
        if used is not None:
            share = GaugeMetricFamily(
                f"{_PREFIX}kv_cache_usage_perc", "Used blocks; 1 is all of them.", labels=names
            )
            share.add_metric(labels, used / self.stats["scheduler"]["blocks"]["num_blocks"])
            yield share
        steps = self.stats.get("step_tokens")
        if steps is not None:
            bounds = [*map(float, STEP_TOKEN_BOUNDS), float("inf")]
            buckets, total = [], 0
            for bound, count in zip(bounds, steps["counts"], strict=True):
                total += count
                buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
            family = HistogramMetricFamily(
                f"{_PREFIX}iteration_tokens_total", "Tokens of a step.", labels=names
            )
            family.add_metric(labels, buckets, steps["sum"])
            yield family

    def _cache_config(self) -> Metric:
        info = self._info
        values = {
            "model_name": self._model_name,
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_blocks),
        }
        family = GaugeMetricFamily(
            f"{_PREFIX}cache_config_info", "The block pool's shape.", labels=list(values)
        )
        family.add_metric(list(values.values()), 1)
        return family


def _at(stats: Mapping[str, Any], path: str) -> float | None:
    """The number at a dotted path; None if this engine does not tell it."""
    found: Any = stats
    for name in path.split("."):
        if name not in found:
            return None
        found = found[name]
    return found
