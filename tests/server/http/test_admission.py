"""Admission limits, timeouts and disconnects: what clients see, and that no request stays in the engine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from mmlora.outputs import RequestOutput
from mmlora.server.api import build_app
from mmlora.server.errors import Refusal
from mmlora.server.http.admission import Admission
from mmlora.server.launch import load_served_models
from tests.server.conftest import (
    RunningServer,
    ServerFactory,
    connect,
    in_thread,
    paused,
    read_answer,
    run_app,
    slow_steps,
    text_part,
    wait_for,
    wait_until_idle,
)

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "ignore_eos": True}
LONG = {**CHAT, "max_tokens": 400}


@pytest.fixture(scope="module")
def server(start_server: ServerFactory) -> RunningServer:
    return start_server()


@contextmanager
def serving(server: RunningServer, admission: Admission) -> Iterator[RunningServer]:
    """Another application around the same engine."""
    app = build_app(server.llm, load_served_models(server.llm), admission=admission)
    with run_app(app) as address:
        yield RunningServer(server.llm, address)


@pytest.fixture
def step_times(server: RunningServer) -> Iterator[list[float]]:
    """Slow each step down to at least 30 ms and yield the start times of the steps."""
    with slow_steps(server.llm, 0.03) as times:
        yield times


def test_the_wait_is_estimated_from_the_rate_at_which_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("mmlora.server.http.admission.time.monotonic", lambda: now[0])
    admission = Admission(capacity=2, max_queued=8)
    for _ in range(10):
        admission.enter()
    assert admission.estimate_wait_s() == 8  # no request has ended yet
    for _ in range(4):
        admission.leave()
        admission.enter()
        now[0] += 0.5
    with pytest.raises(Refusal) as refused:
        admission.enter()
    assert (refused.value.status, dict(refused.value.headers or {})) == (429, {"retry-after": "4"})  # 8 waiting
    now[0] += 1000
    assert admission.estimate_wait_s() == 60
    assert admission.num_open == 10 and admission.num_refused["queue_full"] == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_a_full_queue_is_a_429_with_retry_after(server: RunningServer, path: str) -> None:
    admission = Admission(capacity=1, max_queued=1)
    with serving(server, admission) as bounded:
        with paused(server.llm):
            waiting = [in_thread(httpx.post, f"{bounded.address}/v1/chat/completions", json=CHAT, timeout=60)]
            waiting.append(in_thread(httpx.post, f"{bounded.address}/v1/chat/completions", json=CHAT, timeout=60))
            wait_for(lambda: admission.num_open == 2)
            # Refused after its head: the server does not wait for the body, which never arrives.
            refused = send_head(bounded.address, path, "content-length: 1000000")
            assert refused.startswith(b"HTTP/1.1 429 ") and b"retry-after: 1\r\n" in refused
            error = json.loads(refused.partition(b"\r\n\r\n")[2])["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            with bounded.client as client, pytest.raises(openai.RateLimitError, match="2 requests are open"):
                client.chat.completions.create(model="tiny", messages=CHAT["messages"])  # type: ignore[call-overload]
            assert httpx.get(f"{bounded.address}/v1/models").status_code == 200  # it does not run the model
        for thread, answers in waiting:
            thread.join(60)
            assert answers[0].status_code == 200
        wait_for(lambda: admission.num_open == 0)
        page = httpx.get(f"{bounded.address}/metrics").text
        assert 'mmlora:requests_refused_total{model_name="tiny",reason="queue_full"} 2.0' in page
        assert 'route="other",status="429"} 2.0' in page
        assert bounded.ask(text_part("and now?"))["usage"]["completion_tokens"] == 4


def send_head(address: str, path: str, *headers: str) -> bytes:
    """Send the head of a POST request and return the whole response."""
    with connect(address) as connection:
        lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", *headers, "\r\n"]
        connection.sendall("\r\n".join(lines).encode())
        return read_answer(connection)


def test_a_response_that_takes_too_long_is_a_504_and_aborted(
    server: RunningServer, step_times: list[float], aborted: list[RequestOutput]
) -> None:
    with serving(server, Admission(8, request_timeout=0.5)) as hasty:
        start = time.monotonic()
        answer = httpx.post(f"{hasty.address}/v1/chat/completions", json=LONG, timeout=60)
        assert answer.status_code == 504 and time.monotonic() - start < 10
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("timeout_error", "request_timeout") and "0.5 s" in error["message"]
        wait_until_idle(server)
        assert [output.outputs[0].finish_reason for output in aborted] == ["abort"]
        assert hasty.ask(text_part("short"), max_tokens=1)["usage"]["completion_tokens"] == 1


def test_a_stream_that_takes_too_long_ends_with_an_error_event(
    server: RunningServer, step_times: list[float], aborted: list[RequestOutput]
) -> None:
    with serving(server, Admission(8, request_timeout=0.7)) as hasty, hasty.client as client:
        chunks = []
        with pytest.raises(openai.APIError, match="not complete after 0.7 s"):
            for chunk in client.chat.completions.create(
                model="tiny",
                messages=LONG["messages"],  # type: ignore[arg-type]
                max_tokens=400,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                chunks.append(chunk)
        assert len(chunks) > 2
    wait_until_idle(server)
    assert [output.outputs[0].finish_reason for output in aborted] == ["abort"]


def test_a_slow_body_is_a_408(server: RunningServer) -> None:
    admission = Admission(8, body_timeout=0.4)
    with serving(server, admission) as hasty:
        for path in ("/v1/chat/completions", "/tokenize", "/v1/completions"):
            answer = send_head(hasty.address, path, "content-length: 100")
            assert answer.startswith(b"HTTP/1.1 408 ") and b"body_timeout" in answer and b"connection: close" in answer
        wait_for(lambda: admission.num_open == 0)
        slow = {**LONG, "max_tokens": 100}  # the body timeout does not limit the response
        assert httpx.post(f"{hasty.address}/v1/chat/completions", json=slow, timeout=60).status_code == 200


def test_open_requests_continue_after_admission_is_closed(server: RunningServer, step_times: list[float]) -> None:
    admission = Admission(8)
    with serving(server, admission) as closing:
        thread, answers = in_thread(httpx.post, f"{closing.address}/v1/chat/completions", json=CHAT, timeout=60)
        wait_for(lambda: server.llm.engine.has_unfinished_requests)
        admission.close()
        refused = httpx.post(f"{closing.address}/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        ready = httpx.get(f"{closing.address}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "shutting down"})
        assert httpx.get(f"{closing.address}/health").status_code == 200
        thread.join(60)
        assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
def test_a_disconnect_aborts_the_request_within_a_step(
    server: RunningServer, step_times: list[float], aborted: list[RequestOutput], is_stream: bool
) -> None:
    with connect(server.address) as connection:
        body = json.dumps({**LONG, "stream": is_stream}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_for(lambda: len(step_times) > 5)
        left = time.monotonic()
    wait_until_idle(server)
    assert len(aborted) == 1 and aborted[0].outputs[0].finish_reason == "abort"
    # One step runs, and further ones may start before the event loop sees the disconnect.
    assert sum(begun > left for begun in step_times) <= 3


def test_a_disconnect_during_media_decoding_never_reaches_the_engine(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, is_decoding, may_end = server.llm.engine.process_input, threading.Event(), threading.Event()
    queued: list[Any] = []

    def decode(*arguments: Any) -> Any:
        is_decoding.set()
        assert may_end.wait(60)
        return process(*arguments)

    monkeypatch.setattr(server.llm.engine, "process_input", decode)
    monkeypatch.setattr(server.llm.engine, "add_input", queued.append)
    admission = Admission(8)
    with serving(server, admission) as watched:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{watched.address}/v1/chat/completions", json=LONG, timeout=httpx.Timeout(60, read=0.3))
        assert is_decoding.is_set()
        wait_for(lambda: admission.num_open == 0)  # it does not wait for the decoder
        may_end.set()
        monkeypatch.setattr(server.llm.engine, "process_input", process)
        assert httpx.post(f"{watched.address}/tokenize", json={"prompt": "a"}).status_code == 200
    assert not queued and not server.llm.engine.has_unfinished_requests


def test_a_dead_engine_fails_open_requests_and_refuses_new_ones(start_server: ServerFactory) -> None:
    server = start_server()
    step, is_streaming = server.llm.engine.step, threading.Event()

    def die(**options: Any) -> Any:
        time.sleep(0.02)
        if is_streaming.is_set():
            raise SystemError("broken on purpose")
        return step(**options)

    server.llm.engine.step = die  # type: ignore[method-assign]
    url = f"{server.address}/v1/chat/completions"
    thread, answers = in_thread(httpx.post, url, json=LONG, timeout=60)
    with httpx.stream("POST", url, json={**LONG, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        assert "choices" in next(lines)
        is_streaming.set()
        events = [line for line in lines if line]
    assert "error" in json.loads(events[-2].removeprefix("data: ")) and events[-1] == "data: [DONE]"
    thread.join(60)
    assert answers[0].status_code == 503
    assert httpx.post(url, json=CHAT).status_code == 503
    assert httpx.get(f"{server.address}/health").status_code == 503
    assert httpx.get(f"{server.address}/v1/models").status_code == 200  # for diagnosis
