"""Tracing: spans as an exporter receives them, and as a collector does at shutdown."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mmlora.engine.metrics import RequestRecord
from mmlora.errors import ConfigError
from mmlora.outputs import LoRAChoice
from mmlora.sampling_params import SamplingParams
from mmlora.server.api import build_app
from mmlora.server.launch import load_served_models
from mmlora.server.observability.tracing import Tracer, tracing
from tests.server.conftest import RunningServer, ServerFactory, input_audio_part, run_app, text_part, wait_for
from tests.server_process import run_serve

SECRET = "my secret question"
TRACE_ID, PARENT_ID = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
TRACEPARENT = f"00-{TRACE_ID:032x}-{PARENT_ID:016x}-01"


class Traced:
    """A server that exports its spans to memory."""

    def __init__(self, server: RunningServer, *, log_requests: bool = False) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer = Tracer(self.exporter, "tiny", log_requests=log_requests)
        self.app = build_app(server.llm, load_served_models(server.llm), tracer=self.tracer)
        self.address = ""

    def post(self, route: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        body = {"max_tokens": 3, "temperature": 0, "ignore_eos": True, **body}
        return httpx.post(f"{self.address}{route}", json=body, headers=headers, timeout=120)

    def spans(self, count: int) -> list[ReadableSpan]:
        """Wait for the spans, which are exported after the responses; return them in the order in which they ended."""
        wait_for(lambda: self.tracer._provider.force_flush() and len(self.exporter.get_finished_spans()) >= count)
        found = list(self.exporter.get_finished_spans())
        assert len(found) == count
        self.exporter.clear()
        return found


@contextmanager
def traced_server(server: RunningServer, **options: Any) -> Iterator[Traced]:
    traced = Traced(server, **options)
    with run_app(traced.app) as traced.address:
        yield traced
    traced.tracer.shutdown()


@pytest.fixture(scope="module")
def server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    return start_server(default_mm_loras={"audio": adapters["speech"]})


@pytest.fixture(scope="module")
def traced(server: RunningServer) -> Iterator[Traced]:
    with traced_server(server) as found:
        yield found


def everything(spans: list[ReadableSpan]) -> str:
    return " ".join(span.to_json() for span in spans)


def test_http_and_engine_requests_have_a_span_each(traced: Traced, wav: bytes) -> None:
    parts = [input_audio_part(wav), text_part(SECRET)]
    messages = [{"role": "user", "content": parts}]
    before_ns = time.time_ns()
    answer = traced.post("/v1/chat/completions", {"traceparent": TRACEPARENT}, messages=messages, n=2, top_p=0.5).json()
    request, http = traced.spans(2)
    assert http.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "http.response.status_code": 200,
    }
    assert (http.name, http.kind.name) == ("POST /v1/chat/completions", "SERVER")
    assert http.parent is not None and request.parent is not None and http.context is not None
    assert (http.parent.trace_id, http.parent.span_id) == (TRACE_ID, PARENT_ID), "the span continues the client's trace"
    assert request.parent.span_id == http.context.span_id and request.name == "chat tiny"
    attributes = dict(request.attributes or {})
    latencies = {name: attributes.pop(name) for name in list(attributes) if name.startswith("gen_ai.latency.")}
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mmlora",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.temperature": 0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.presence_penalty": 0,
        "gen_ai.request.frequency_penalty": 0,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 6,
        "mmlora.lora.adapter": "audio",
        "mmlora.lora.reason": "default:audio",
        "mmlora.lora.digest": answer["lora"]["digest"],
        "mmlora.media.audio": 1,
    }
    queue, first, prefill, decode, whole = (
        latencies[f"gen_ai.latency.{name}"]
        for name in ("time_in_queue", "time_to_first_token", "time_in_model_prefill", "time_in_model_decode", "e2e")
    )
    assert queue >= 0 and prefill > 0 and decode > 0 and queue + prefill <= first < first + decode <= whole * 1.0001
    assert None not in (http.start_time, http.end_time, request.start_time, request.end_time)
    assert before_ns - 10**7 < http.start_time <= request.start_time + 10**6  # type: ignore[operator]
    assert request.end_time - 10**6 <= http.end_time < time.time_ns() + 10**7  # type: ignore[operator]
    assert request.end_time - request.start_time == pytest.approx(whole * 1e9, abs=1e6)  # type: ignore[operator]
    for text in (SECRET, parts[0]["input_audio"]["data"][:40], answer["choices"][0]["message"]["content"]):
        assert text not in everything([request, http])


def test_spans_of_completions_refusals_and_unknown_routes(traced: Traced) -> None:
    traced.post("/v1/completions", prompt=["one", "two"]).raise_for_status()
    first, second, http = traced.spans(3)
    assert [span.name for span in (first, second, http)] == [*["text_completion tiny"] * 2, "POST /v1/completions"]
    assert first.attributes is not None and "mmlora.lora.adapter" not in first.attributes
    assert http.parent is None and "gen_ai.request.seed" not in first.attributes
    assert traced.post("/v1/completions", prompt=SECRET * 999).status_code == 400
    (refused,) = traced.spans(1)
    assert refused.attributes is not None and refused.attributes["http.response.status_code"] == 400
    assert refused.status.is_unset and "secret" not in everything([refused])
    httpx.get(f"{traced.address}/health")
    httpx.get(f"{traced.address}/metrics")
    httpx.get(f"{traced.address}/no%0Awhere?{SECRET}")
    (lost,) = traced.spans(1)
    assert lost.attributes is not None and lost.attributes["url.path"] == "/no%0Awhere"
    assert lost.name == "GET other" and "secret" not in everything([lost])


def test_an_unsampled_trace_stays_unsampled(traced: Traced) -> None:
    traced.post("/v1/completions", {"traceparent": TRACEPARENT[:-2] + "00"}, prompt="x").raise_for_status()
    traced.post("/v1/completions", {"traceparent": "nonsense"}, prompt="x").raise_for_status()
    _, http = traced.spans(2)
    assert http.parent is None


def test_failures_are_marked_in_spans(traced: Traced, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.llm.engine.runner, "run", lambda _: 1 / 0)
    assert traced.post("/v1/completions", prompt="x").status_code == 500
    request, http = traced.spans(2)
    assert not request.status.is_ok and not http.status.is_ok and not http.status.is_unset
    assert http.attributes is not None and http.attributes["error.type"] == "500"
    assert request.attributes is not None and request.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert "gen_ai.latency.time_to_first_token" not in request.attributes


def test_a_client_that_disconnects_ends_its_spans(traced: Traced) -> None:
    body = {"prompt": "x", "max_tokens": 480, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{traced.address}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    request, _ = traced.spans(2)
    assert request.attributes is not None and request.attributes["gen_ai.response.finish_reasons"] == ("abort",)


def test_prompts_are_in_spans_with_log_requests(server: RunningServer, wav: bytes) -> None:
    with traced_server(server, log_requests=True) as traced:
        messages = [{"role": "user", "content": [input_audio_part(wav), text_part(SECRET)]}]
        traced.post("/v1/chat/completions", messages=messages).raise_for_status()
        request, _ = traced.spans(2)
    assert request.attributes is not None and SECRET in str(request.attributes["mmlora.request.prompt"])
    assert '"modality": "audio"' in str(request.attributes["mmlora.request.media"])
    assert input_audio_part(wav)["input_audio"]["data"][:40] not in everything([request])


def test_a_name_that_is_not_utf8_does_not_fail_the_batch() -> None:
    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter, "ti\udcffny")
    choice = LoRAChoice("na\udcffme", "digest", "explicit")
    record = RequestRecord("r", 1.0, queued_s=1.0, params=SamplingParams(), lora=choice)
    fields = {"method": "POST", "path": "/x", "status": 200}
    tracer.trace({"type": "http", "headers": []}, "/x", fields, 0.5, [record])
    tracer.shutdown()
    assert b"na?me" in encode_spans(exporter.get_finished_spans()).SerializeToString()


class Collector(BaseHTTPRequestHandler):
    """Collector that keeps the OTLP requests it receives."""

    received: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        self.received.append(ExportTraceServiceRequest.FromString(content))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_shutdown_exports_the_remaining_spans(tiny_phi4: Path) -> None:
    kind = type("Kept", (Collector,), {"received": []})
    with HTTPServer(("127.0.0.1", 0), kind) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        options = ["--device", "cpu", "--served-model-name", "tiny", "--otlp-traces-endpoint", url]
        with run_serve(str(tiny_phi4), *options) as process:
            body = {"prompt": SECRET, "max_tokens": 2}
            httpx.post(f"{process.address}/v1/completions", json=body, timeout=60).raise_for_status()
            process.stop(signal.SIGINT)
        collector.shutdown()
    sent = [resource for request in kind.received for resource in request.resource_spans]
    names = {span.name for resource in sent for scope in resource.scope_spans for span in scope.spans}
    assert names == {"text_completion tiny", "POST /v1/completions"}
    services = {a.value.string_value for r in sent for a in r.resource.attributes if a.key == "service.name"}
    assert services == {"mmlora"} and SECRET not in str(sent)


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "ftp://host/v1/traces", "http:///v1/traces"])
def test_an_endpoint_that_is_not_a_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint=.*must be a URL"), tracing(endpoint, "tiny"):
        pass


def test_a_shutdown_does_not_wait_for_an_unresponsive_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = threading.Event()
    monkeypatch.setattr("mmlora.server.observability.tracing.SHUTDOWN_TIMEOUT_S", 0.2)
    monkeypatch.setattr(OTLPSpanExporter, "export", lambda *_: is_over.wait(60))
    with tracing("http://127.0.0.1:9/v1/traces", "tiny") as tracer:
        assert tracer is not None
        scope = {"type": "http", "headers": []}
        tracer.trace(scope, "/x", {"method": "GET", "path": "/x", "status": 200}, time.monotonic(), [])
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 30
    is_over.set()


WITHOUT_EXTRA = """
import sys
sys.modules |= dict.fromkeys(["opentelemetry.sdk", "opentelemetry.exporter"])  # None: not importable
from mmlora.errors import ConfigError
from mmlora.server.observability.tracing import tracing
with tracing(None, "tiny") as tracer:
    assert tracer is None
try:
    with tracing("http://localhost:4318/v1/traces", "tiny"):
        pass
except ConfigError as error:
    print(error)
"""


def test_without_the_tracing_extra_only_the_option_fails() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRA], capture_output=True, text=True, timeout=300)
    assert "otlp_traces_endpoint=" in done.stdout and "mmlora[tracing]" in done.stdout, done.stderr
