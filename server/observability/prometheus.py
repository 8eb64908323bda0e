"""`GET /metrics`: metrics in Prometheus' text format or OpenMetrics.

`EngineMetrics` and `RequestHistograms` are plain numbers; a collector turns them into samples at each scrape, in the
thread pool of the web framework. Each application has its own registry. Metric names are vLLM's where vLLM has them:
routers such as the Kubernetes inference gateway find the load, the adapters and the KV cache by these names.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.registry import Collector
from starlette.responses import PlainTextResponse, Response

from mmlora.async_llm import AsyncLLM
from mmlora.engine.metrics import AdapterMetrics, EngineMetrics, Histogram, RequestHistograms
from mmlora.processors.media.worker_pool import WorkerPool
from mmlora.server.http.admission import Admission
from mmlora.server.observability.access_log import AccessLog, HttpCounts
from mmlora.server.observability.tracing import Tracer
from mmlora.utils.text import as_utf8

FINISH_REASONS = ("stop", "length", "abort", "error")
LabelledValues = Mapping[Any, float]  # keys: tuples of label values, in the order of the labels


def add_metrics(
    app: FastAPI,
    llm: AsyncLLM,
    admission: Admission,
    *,
    prefix: str = "mmlora",
    log_requests: bool = False,
    tracer: Tracer | None = None,
) -> None:
    """Add the access log and `GET /metrics` to an application.

    Args:
        llm, admission: what is measured.
        prefix: what metric names have before the colon.
        log_requests, tracer: see `AccessLog`.
    """
    counts = HttpCounts()
    app.add_middleware(AccessLog, counts=counts, log_requests=log_requests, tracer=tracer)
    registry = CollectorRegistry()
    registry.register(EngineCollector(llm, counts, admission, prefix))

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics(request: Request) -> Response:  # not a coroutine: runs in a thread, off the event loop
        encode: Any
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        # Colons are legal in names of every format, but some encoders replace them, unless they escape nothing.
        content = encode(registry, escaping=ALLOWUTF8)
        return Response(content, headers={"content-type": content_type.partition("; escaping=")[0]})


class EngineCollector(Collector):
    """Collects the metrics of one engine, and the requests that its server received (`counts`) and refused."""

    def __init__(self, llm: AsyncLLM, counts: HttpCounts, admission: Admission, prefix: str) -> None:
        self._llm = llm
        self._counts = counts
        self._admission = admission
        self._factory = _MetricFactory(prefix, llm.model_name)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of one scrape."""
        metrics, make = self._llm.metrics, self._factory
        yield from _request_metrics(make, metrics)
        yield from _cache_metrics(make, metrics)
        yield from _decode_metrics(make, self._llm.media.workers)
        yield from _adapter_metrics(make, metrics)
        yield from _residency_metrics(make, metrics)
        yield from _latency_metrics(make, self._llm.histograms)
        refused = _labelled(self._admission.num_refused.copy())
        yield make.gauge(
            "num_requests_open", "Requests being received, processed, waiting or running", self._admission.num_open
        )
        yield make.counter("requests_refused", "Requests refused by admission, by reason", refused, ["reason"])
        http = {(route, str(status)): count for (route, status), count in self._counts.copy().items()}
        yield make.counter("http_requests", "HTTP requests by route and status", http, ("route", "status"))


class _MetricFactory:
    """Creates metric families with the name prefix and `model_name` as the first label."""

    def __init__(self, prefix: str, model_name: str) -> None:
        self._prefix = f"{prefix}:"
        self._model_name = as_utf8(model_name)

    def counter(self, name: str, text: str, values: float | LabelledValues, labels: Sequence[str] = ()) -> Metric:
        return self._fill(CounterMetricFamily(self._prefix + name, text, labels=["model_name", *labels]), values)

    def gauge(self, name: str, text: str, values: float | LabelledValues, labels: Sequence[str] = ()) -> Metric:
        return self._fill(GaugeMetricFamily(self._prefix + name, text, labels=["model_name", *labels]), values)

    def histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        counts = histogram.counts()
        ends = [*(f"{bound:g}" for bound in counts.bounds), "+Inf"]
        family = HistogramMetricFamily(self._prefix + name, text, labels=["model_name"])
        family.add_metric([self._model_name], list(zip(ends, counts.cumulative, strict=True)), counts.total)
        return family

    def _fill(self, family: CounterMetricFamily | GaugeMetricFamily, values: float | LabelledValues) -> Metric:
        for labels, value in values.items() if isinstance(values, Mapping) else [((), values)]:
            family.add_metric([self._model_name, *map(as_utf8, labels)], value)
        return family


def _request_metrics(make: _MetricFactory, metrics: EngineMetrics) -> Iterator[Metric]:
    finished = dict.fromkeys(FINISH_REASONS, 0) | dict(metrics.total_finished)
    yield make.gauge("num_requests_running", "Running requests", metrics.num_requests_running)
    yield make.gauge("num_requests_waiting", "Waiting requests", metrics.num_requests_waiting)
    yield make.counter("request_success", "Completions by finish reason", _labelled(finished), ["finished_reason"])
    yield make.counter(
        "lora_decisions", "Requests by the reason for their adapter", _labelled(metrics.total_requests), ["reason"]
    )
    yield make.counter("prompt_tokens", "Prompt tokens of requests that were scheduled", metrics.total_prompt_tokens)
    yield make.counter("generation_tokens", "Generated tokens", metrics.total_output_tokens)
    yield make.counter("num_preemptions", "Sequences preempted and recomputed", metrics.total_preemptions)


def _cache_metrics(make: _MetricFactory, metrics: EngineMetrics) -> Iterator[Metric]:
    usage = metrics.num_kv_blocks_used / metrics.num_kv_blocks
    yield make.gauge("kv_cache_usage_perc", "Fraction of KV blocks in use (0 to 1)", usage)
    sizes = {(str(metrics.block_size), str(metrics.num_kv_blocks)): 1.0}
    text = "Tokens of a KV block, and number of KV blocks; the value is always 1"
    yield make.gauge("cache_config_info", text, sizes, ("block_size", "num_gpu_blocks"))
    yield make.counter(
        "prefix_cache_queries", "Prompt tokens looked up in the prefix cache", metrics.total_prefix_queries
    )
    yield make.counter("prefix_cache_hits", "Prompt tokens found in the prefix cache", metrics.total_cached_tokens)
    num_queries = metrics.total_encoder_hits + metrics.total_encoder_misses
    yield make.counter("encoder_cache_queries", "Media items looked up in the encoder cache", num_queries)
    yield make.counter("encoder_cache_hits", "Media items found in the encoder cache", metrics.total_encoder_hits)
    yield make.gauge("encoder_cache_bytes", "Bytes of cached encoded media", metrics.num_encoder_cache_bytes)


def _decode_metrics(make: _MetricFactory, workers: WorkerPool) -> Iterator[Metric]:
    yield make.counter("media_decode_seconds", "Seconds that media decoders were busy", workers.decode_s)
    text = "Media decoders that were killed or have crashed, by reason"
    yield make.counter("media_decoders_lost", text, _labelled(workers.num_lost.copy()), ["reason"])


def _adapter_metrics(make: _MetricFactory, metrics: EngineMetrics) -> Iterator[Metric]:
    running, waiting = _by_adapter(metrics, "num_requests_running"), _by_adapter(metrics, "num_requests_waiting")
    labels = ("adapter", "kind")
    yield make.gauge("lora_requests_running", "Running requests by adapter", running, labels)
    yield make.gauge("lora_requests_waiting", "Waiting requests by adapter", waiting, labels)
    known = [adapter for adapter in metrics.adapters if not adapter.is_mix]
    resident = {(*_adapter_labels(adapter), "host"): float(adapter.is_on_host) for adapter in known}
    resident |= {(*_adapter_labels(adapter), "slot"): float(adapter.is_on_device) for adapter in known}
    yield make.gauge("lora_resident", "Whether an adapter is in this place", resident, (*labels, "place"))
    loads, load_s = ({_adapter_labels(a): getattr(a, name) for a in known} for name in ("num_loads", "load_s"))
    yield make.counter("lora_loads", "Loads of an adapter", loads, labels)
    yield make.counter("lora_load_seconds", "Seconds spent loading an adapter", load_s, labels)
    yield make.counter("lora_evictions", "Adapters evicted from host memory", metrics.total_adapter_evictions)
    num_bytes = {("host",): metrics.num_host_adapter_bytes, ("slot",): metrics.num_device_adapter_bytes}
    yield make.gauge("lora_bytes", "Bytes of adapters in host memory or slots", num_bytes, ["place"])
    names = (
        ",".join(dict.fromkeys(name for (name, _), count in counts.items() if count and name))
        for counts in (running, waiting)
    )
    info = {(str(metrics.max_loras), *names): time.time()}
    yield make.gauge(
        "lora_requests_info",
        "Adapters of running and waiting requests; the value is the Unix time",
        info,
        ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    )


def _residency_metrics(make: _MetricFactory, metrics: EngineMetrics) -> Iterator[Metric]:
    """Yield where adapters are loaded: at most one series per adapter, which ends when it is evicted or unloaded."""
    loaded = {}
    for adapter in metrics.adapters:
        if adapter.is_on_host or adapter.is_on_device:
            level = "gpu" if adapter.is_on_device else "cpu"
            loaded[adapter.name, level, str(adapter.is_pinned).lower(), str(adapter.rank)] = 1.0
    yield make.gauge(
        "lora_adapter_loaded",
        "Loaded adapters: level is gpu for those in a slot, cpu for others in host memory; the value is always 1",
        loaded,
        ("adapter_name", "level", "pinned", "rank"),
    )
    num_gpu, num_cpu = (sum(getattr(a, name) for a in metrics.adapters) for name in ("is_on_device", "is_on_host"))
    yield make.gauge("num_gpu_loaded_lora_adapters", "Adapters in slots, without mixes", num_gpu)
    yield make.gauge("num_cpu_loaded_lora_adapters", "Adapters in host memory, also those in slots", num_cpu)
    yield make.gauge("max_gpu_lora_adapters", "Number of slots", metrics.max_loras)


def _latency_metrics(make: _MetricFactory, histograms: RequestHistograms) -> Iterator[Metric]:
    yield make.histogram("time_to_first_token_seconds", "Time to the first token", histograms.first_token)
    yield make.histogram("inter_token_latency_seconds", "Time between consecutive tokens", histograms.inter_token)
    yield make.histogram("e2e_request_latency_seconds", "Time from the request to its end", histograms.end_to_end)
    yield make.histogram("request_queue_time_seconds", "Time in the waiting queue", histograms.queue)
    yield make.histogram("request_prompt_tokens", "Prompt tokens of finished requests", histograms.prompt_tokens)
    yield make.histogram("request_generation_tokens", "Generated tokens of finished requests", histograms.output_tokens)


def _adapter_labels(adapter: AdapterMetrics) -> tuple[str, str]:
    """Return `adapter` and `kind`. All mixes share one label: clients choose the scales, so names are unbounded."""
    if adapter.is_mix:
        return "", "mix"
    return adapter.name, "default" if adapter.is_default else "adapter"


def _by_adapter(metrics: EngineMetrics, name: str) -> dict[tuple[str, ...], float]:
    counts: dict[tuple[str, ...], float] = {}
    for adapter in metrics.adapters:
        counts[_adapter_labels(adapter)] = counts.get(_adapter_labels(adapter), 0) + getattr(adapter, name)
    return counts


def _labelled(values: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(name,): value for name, value in values.items()}
