"""OpenTelemetry tracing: spans of HTTP requests and of their engine requests, exported with OTLP over HTTP.

Spans are created when a request has ended, from the data of the access log, and exported in batches by a thread of the
SDK. OpenTelemetry is imported only if tracing is enabled.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from mmlora.engine.metrics import RequestRecord
from mmlora.errors import ConfigError
from mmlora.utils.text import as_utf8

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

UNTRACED_ROUTES: Final = ("/health", "/ready", "/metrics")  # polled every few seconds
SHUTDOWN_TIMEOUT_S: Final = 5
REQUEST_OPTIONS: Final = (
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "seed",
    "presence_penalty",
    "frequency_penalty",
)
Attributes = dict[str, Any]


class Tracer:
    """Creates and exports spans; a client's `traceparent` header continues its trace.

    Args:
        exporter: exports the spans in batches.
        model_name: name of the base model.
        log_requests: include prompts and media hashes.
    """

    def __init__(self, exporter: "SpanExporter", model_name: str, *, log_requests: bool = False) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # OTEL_SERVICE_NAME is not set
            resource = resource.merge(Resource({SERVICE_NAME: "mmlora"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mmlora")
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = as_utf8(model_name)
        self._log_requests = log_requests

    def trace(
        self, scope: Scope, route: str, fields: Mapping[str, Any], start_s: float, records: Sequence[RequestRecord]
    ) -> None:
        """Create the spans of an HTTP request that has ended.

        Args:
            scope: ASGI scope of the request.
            route: its route's path template.
            fields: its method, path and status.
            start_s: when it was received (monotonic clock).
            records: its engine requests.
        """
        from opentelemetry import trace

        if route in UNTRACED_ROUTES:
            return
        end_s = time.monotonic()
        attributes = {
            "http.request.method": fields["method"],
            "http.route": route,
            "url.path": fields["path"],
            "url.scheme": scope.get("scheme", "http"),
            "http.response.status_code": fields["status"],
        }
        span = self._tracer.start_span(
            f"{fields['method']} {route}",
            self._propagator.extract(Headers(scope=scope)),
            trace.SpanKind.SERVER,
            attributes,
            start_time=_wall_ns(start_s),
        )
        if span.is_recording():
            parent = trace.set_span_in_context(span)
            for record in records:
                if record.queued_s:
                    self._trace_request(record, route, parent, end_s)
        if fields["status"] >= 500:
            span.set_attribute("error.type", str(fields["status"]))
            span.set_status(trace.StatusCode.ERROR)
        span.end(_wall_ns(end_s))

    def shutdown(self) -> None:
        """Export the remaining spans; give up after a timeout if the collector does not respond."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(SHUTDOWN_TIMEOUT_S)

    def _trace_request(self, record: RequestRecord, route: str, parent: "Context", end_s: float) -> None:
        """Create the span of an engine request."""
        from opentelemetry import trace

        operation = "text_completion" if route == "/v1/completions" else "chat"
        end_s = record.times.end_s if record.times is not None else end_s
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "mmlora",
            "gen_ai.request.model": self._model_name,
            **_request_attributes(record),
            **_response_attributes(record, end_s),
            **(_content_attributes(record) if self._log_requests else {}),
        }
        name = f"{operation} {self._model_name}"
        span = self._tracer.start_span(name, parent, attributes=attributes, start_time=_wall_ns(record.start_s))
        if "error" in record.all_finish_reasons:
            span.set_status(trace.StatusCode.ERROR)
        span.end(_wall_ns(end_s))


@contextmanager
def tracing(endpoint: str | None, model_name: str, *, log_requests: bool = False) -> Iterator[Tracer | None]:
    """Yield a tracer that exports to a collector, or None without an endpoint; export the remaining spans on exit.

    Args:
        endpoint: OTLP-over-HTTP URL, such as `http://localhost:4318/v1/traces`.
        model_name, log_requests: see `Tracer`.

    Raises:
        ConfigError: the URL is invalid, or OpenTelemetry is not installed.
    """
    if endpoint is None:
        yield None
        return
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"otlp_traces_endpoint={endpoint!r}: must be a URL, such as http://localhost:4318/v1/traces")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        message = (
            f"otlp_traces_endpoint={endpoint!r}: needs the extra `tracing` (pip install 'mmlora[tracing]'): {error}"
        )
        raise ConfigError(message) from None
    tracer = Tracer(OTLPSpanExporter(endpoint=endpoint), model_name, log_requests=log_requests)
    try:
        yield tracer
    finally:
        tracer.shutdown()


def _request_attributes(record: RequestRecord) -> Attributes:
    """Return the sampling parameters, adapter and media counts of a request, without content."""
    options = {f"gen_ai.request.{name}": getattr(record.params, name) for name in REQUEST_OPTIONS}
    choice = record.lora
    lora = {"adapter": choice.adapter, "reason": choice.reason, "digest": choice.digest} if choice is not None else {}
    modalities = Counter(item.modality for item in record.media)
    attributes = {
        "gen_ai.request.choice.count": record.num_completions,
        **options,
        **{f"mmlora.lora.{name}": value for name, value in lora.items()},
        **{f"mmlora.media.{modality}": count for modality, count in modalities.items()},
    }
    texts = {name: as_utf8(value) for name, value in attributes.items() if isinstance(value, str)}
    return {name: value for name, value in {**attributes, **texts}.items() if value is not None}


def _response_attributes(record: RequestRecord, end_s: float) -> Attributes:
    """Return the finish reasons, token counts and latencies (s) of a request."""
    attributes: Attributes = {
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.finish_reasons": record.all_finish_reasons,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        "gen_ai.usage.output_tokens": record.num_output_tokens,
        "gen_ai.latency.e2e": end_s - record.start_s,
    }
    times = record.times
    if times is not None and record.num_output_tokens:
        attributes["gen_ai.latency.time_in_queue"] = times.scheduled_s - record.queued_s
        attributes["gen_ai.latency.time_to_first_token"] = times.first_token_s - record.start_s
        attributes["gen_ai.latency.time_in_model_prefill"] = times.prefill_s
        attributes["gen_ai.latency.time_in_model_decode"] = times.decode_s
    return attributes


def _content_attributes(record: RequestRecord) -> Attributes:
    media = json.dumps([asdict(item) for item in record.media])
    return {"mmlora.request.prompt": record.prompt or "", "mmlora.request.media": media}


def _wall_ns(monotonic_s: float) -> int:
    """Convert a time of the monotonic clock to nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)
