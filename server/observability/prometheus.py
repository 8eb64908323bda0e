"""`GET /metrics`: everything that is counted, in Prometheus' text format.

The numbers are plain ones, `EngineMetrics` and `RequestHistograms`; they become samples when somebody asks, in a thread
of the web framework's pool. Each application has a registry of its own. Names are vLLM's where it has them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.responses import PlainTextResponse, Response

from mmlora.async_llm import AsyncLLM
from mmlora.engine.metrics import AdapterMetrics, EngineMetrics, Histogram, RequestHistograms
from mmlora.server.http.admission import Admission
from mmlora.server.observability.access_log import AccessLog, HttpCounts
from mmlora.server.observability.tracing import Tracer
from mmlora.utils.text import as_utf8

METRIC_PREFIX = "mmlora:"
FINISH_REASONS = ("stop", "length", "abort", "error")
Labelled = Mapping[Any, float]  # by the values of the labels, in their order


def add_metrics(
    app: FastAPI, llm: AsyncLLM, admission: Admission, *, log_requests: bool = False, tracer: Tracer | None = None
) -> None:
    """Count and log the requests of an application, and serve `/metrics`.

    Args:
        app: the application.
        llm: its engine.
        admission: of its server.
        log_requests, tracer: see `AccessLog`.
    """
    counts: HttpCounts = HttpCounts()
    app.add_middleware(AccessLog, counts=counts, log_requests=log_requests, tracer=tracer)
    registry = CollectorRegistry()
    registry.register(EngineCollector(llm, counts, admission))

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics(request: Request) -> Response:  # no coroutine, so that the event loop goes on meanwhile
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})


class EngineCollector(Collector):
    """Makes the samples of one scrape.

    Args:
        llm: the engine.
        counts: HTTP requests by route and status.
        admission: of the server.
    """

    def __init__(self, llm: AsyncLLM, counts: HttpCounts, admission: Admission) -> None:
        self._llm = llm
        self._counts = counts
        self._admission = admission
        self._families = _Families(llm.model_name)

    def collect(self) -> Iterator[Metric]:
        """Take a snapshot and yield its metrics."""
        metrics, make = self._llm.metrics, self._families
        yield from _requests(make, metrics)
        yield from _caches(make, metrics)
        yield from _adapters(make, metrics)
        yield from _histograms(make, self._llm.histograms)
        refused = _by_one(self._admission.num_refused.copy())
        yield make.gauge(
            "num_requests_open", "Requests being read, made ready, waiting or running", self._admission.num_open
        )
        yield make.counter("requests_refused", "Requests that were not let in, by reason", refused, ["reason"])
        http = {(route, str(status)): count for (route, status), count in self._counts.copy().items()}
        yield make.counter("http_requests", "HTTP requests by route and status", http, ("route", "status"))


class _Families:
    """Makes metrics with the prefix, and the model's name as the first label."""

    def __init__(self, model_name: str) -> None:
        self._model_name = as_utf8(model_name)

    def counter(self, name: str, text: str, values: float | Labelled, labels: Sequence[str] = ()) -> Metric:
        return self._fill(CounterMetricFamily(METRIC_PREFIX + name, text, labels=["model_name", *labels]), values)

    def gauge(self, name: str, text: str, values: float | Labelled, labels: Sequence[str] = ()) -> Metric:
        return self._fill(GaugeMetricFamily(METRIC_PREFIX + name, text, labels=["model_name", *labels]), values)

    def histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        counts = histogram.counts()
        ends = [*(f"{bound:g}" for bound in counts.bounds), "+Inf"]
        family = HistogramMetricFamily(METRIC_PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model_name], list(zip(ends, counts.cumulative, strict=True)), counts.total)
        return family

    def _fill(self, family: CounterMetricFamily | GaugeMetricFamily, values: float | Labelled) -> Metric:
        for labels, value in values.items() if isinstance(values, Mapping) else [((), values)]:
            family.add_metric([self._model_name, *map(as_utf8, labels)], value)
        return family


def _requests(make: _Families, metrics: EngineMetrics) -> Iterator[Metric]:
    finished = dict.fromkeys(FINISH_REASONS, 0) | dict(metrics.total_finished)
    yield make.gauge("num_requests_running", "Requests that run", metrics.num_requests_running)
    yield make.gauge("num_requests_waiting", "Requests that wait", metrics.num_requests_waiting)
    yield make.counter("request_success", "Answers that ended, by reason", _by_one(finished), ["finished_reason"])
    yield make.counter(
        "lora_decisions", "Requests by the reason of their adapter", _by_one(metrics.total_requests), ["reason"]
    )
    yield make.counter("prompt_tokens", "Prompt tokens of requests that have begun", metrics.total_prompt_tokens)
    yield make.counter("generation_tokens", "Tokens generated", metrics.total_output_tokens)
    yield make.counter(
        "num_preemptions", "Sequences that had to start over for lack of room", metrics.total_preemptions
    )


def _caches(make: _Families, metrics: EngineMetrics) -> Iterator[Metric]:
    usage = metrics.num_kv_blocks_used / metrics.num_kv_blocks
    yield make.gauge("kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all of them", usage)
    yield make.counter(
        "prefix_cache_queries", "Prompt tokens looked for in the prefix cache", metrics.total_prefix_queries
    )
    yield make.counter("prefix_cache_hits", "Prompt tokens found in the prefix cache", metrics.total_cached_tokens)
    num_asked = metrics.total_encoder_hits + metrics.total_encoder_misses
    yield make.counter("encoder_cache_queries", "Media items looked for in the encoder cache", num_asked)
    yield make.counter("encoder_cache_hits", "Media items found in the encoder cache", metrics.total_encoder_hits)
    yield make.gauge("encoder_cache_bytes", "Bytes of encoded media that are kept", metrics.num_encoder_cache_bytes)


def _adapters(make: _Families, metrics: EngineMetrics) -> Iterator[Metric]:
    running, waiting = _by_adapter(metrics, "num_requests_running"), _by_adapter(metrics, "num_requests_waiting")
    labels = ("adapter", "kind")
    yield make.gauge("lora_requests_running", "Requests that run, by adapter", running, labels)
    yield make.gauge("lora_requests_waiting", "Requests that wait, by adapter", waiting, labels)
    known = [adapter for adapter in metrics.adapters if not adapter.is_mix]
    resident = {(*_key(adapter), "host"): float(adapter.is_on_host) for adapter in known}
    resident |= {(*_key(adapter), "slot"): float(adapter.is_on_device) for adapter in known}
    yield make.gauge("lora_resident", "Whether an adapter is in host memory, in a slot", resident, (*labels, "place"))
    loads, load_s = ({_key(a): getattr(a, name) for a in known} for name in ("num_loads", "load_s"))
    yield make.counter("lora_loads", "Loads of an adapter", loads, labels)
    yield make.counter("lora_load_seconds", "Seconds spent on loads of an adapter", load_s, labels)
    yield make.counter("lora_evictions", "Adapters that left the host for others", metrics.total_adapter_evictions)
    num_bytes = {("host",): metrics.num_host_adapter_bytes, ("slot",): metrics.num_device_adapter_bytes}
    yield make.gauge("lora_bytes", "Bytes of adapters in host memory, in slots", num_bytes, ["place"])
    names = (
        ",".join(dict.fromkeys(name for (name, _), count in found.items() if count and name))
        for found in (running, waiting)
    )
    info = {(str(metrics.max_loras), *names): time.time()}
    yield make.gauge(
        "lora_requests_info",
        "When these adapters ran and waited (Unix time)",
        info,
        ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    )


def _histograms(make: _Families, found: RequestHistograms) -> Iterator[Metric]:
    yield make.histogram("time_to_first_token_seconds", "From the call to the first token", found.first_token)
    yield make.histogram("inter_token_latency_seconds", "From a token of an answer to its next", found.inter_token)
    yield make.histogram("e2e_request_latency_seconds", "From the call to the end", found.end_to_end)
    yield make.histogram("request_queue_time_seconds", "From being ready to running", found.queue)
    yield make.histogram("request_prompt_tokens", "Prompt tokens of a request that ended", found.prompt_tokens)
    yield make.histogram("request_generation_tokens", "Tokens generated for a request", found.output_tokens)


def _key(adapter: AdapterMetrics) -> tuple[str, str]:
    """Labels of an adapter. All mixes are one: clients choose their weights, so there is no end of names."""
    if adapter.is_mix:
        return "", "mix"
    return adapter.name, "default" if adapter.is_default else "adapter"


def _by_adapter(metrics: EngineMetrics, name: str) -> dict[tuple[str, ...], float]:
    counts: dict[tuple[str, ...], float] = {}
    for adapter in metrics.adapters:
        counts[_key(adapter)] = counts.get(_key(adapter), 0) + getattr(adapter, name)
    return counts


def _by_one(values: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(name,): value for name, value in values.items()}
