"""Graceful shutdown: open requests may finish within the drain timeout, and the process exits with code 0."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from tests.server.conftest import in_thread, paused, run_server, slow_steps, wait_for
from tests.server_process import run_serve

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "ignore_eos": True}


@pytest.fixture
def start_llm(tiny_phi4: Path) -> Callable[[], AsyncLLM]:
    return lambda: AsyncLLM(EngineArgs(str(tiny_phi4), served_model_name="tiny", max_model_len=512, device="cpu"))


def test_open_requests_finish_and_new_ones_are_refused(start_llm: Callable[[], AsyncLLM]) -> None:
    llm = start_llm()
    with run_server(llm, drain_timeout=60, uvicorn_log_level="error") as (server, address), httpx.Client() as idle:
        url = f"{address}/v1/chat/completions"
        assert idle.get(f"{address}/ready").status_code == 200
        with paused(llm):
            thread, answers = in_thread(httpx.post, url, json=CHAT, timeout=60)
            streaming, streams = in_thread(httpx.post, url, json={**CHAT, "stream": True}, timeout=60)
            wait_for(lambda: server._admission.num_open == 2)
            server.handle_exit(signal.SIGTERM, None)
            assert httpx.get(f"{address}/ready").json() == {"status": "shutting down"}
            refused = idle.post(url, json=CHAT)  # on the kept-alive connection, or on a new one
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert httpx.post(url, json=CHAT).status_code == 503
        thread.join(60)
        assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 4
        streaming.join(60)
        assert '"finish_reason":"length"' in streams[0].text and streams[0].text.endswith("data: [DONE]\n\n")
        wait_for(lambda: not llm.is_alive)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/ready")


def test_requests_that_outlast_the_drain_end_with_an_error(start_llm: Callable[[], AsyncLLM]) -> None:
    llm = start_llm()
    with slow_steps(llm, 0.03), run_server(llm, drain_timeout=0.3, uvicorn_log_level="error") as (server, address):
        url, long = f"{address}/v1/chat/completions", {**CHAT, "max_tokens": 480}
        thread, answers = in_thread(httpx.post, url, json=long, timeout=60)
        with httpx.stream("POST", url, json={**long, "stream": True}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            wait_for(lambda: server._admission.num_open == 2)
            start = time.monotonic()
            server.drain()
            events = [line.removeprefix("data: ") for line in lines if line]
        thread.join(60)
        assert events[-1] == "[DONE]" and "shutting down" in json.loads(events[-2])["error"]["message"]
        assert answers[0].status_code == 503
        assert 0.3 <= time.monotonic() - start < 12


def test_a_second_signal_ends_the_process_immediately(
    start_llm: Callable[[], AsyncLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, ended = start_llm(), []
    monkeypatch.setattr("mmlora.server.http.server.signal.signal", lambda *_: None)
    monkeypatch.setattr("mmlora.server.http.server.os.kill", lambda _, sig: ended.append(sig))
    with run_server(llm, uvicorn_log_level="error") as (server, address):
        with paused(llm):
            thread, _ = in_thread(httpx.post, f"{address}/v1/chat/completions", json=CHAT, timeout=60)
            wait_for(lambda: server._admission.num_open == 1)
            server.handle_exit(signal.SIGTERM, None)
            assert not ended
            server.handle_exit(signal.SIGINT, None)
            assert ended == [signal.SIGINT]
        thread.join(60)


def test_sigterm_ends_streams_and_exits_with_0(tiny_phi4: Path) -> None:
    with run_serve(str(tiny_phi4), "--device", "cpu", "--drain-timeout", "0.2") as server:
        body = {**CHAT, "n": 64, "max_tokens": 400, "stream": True}  # 25,600 tokens
        with httpx.stream("POST", f"{server.address}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]" and "shutting down" in json.loads(events[-2])["error"]["message"]
        assert server.process.wait(60) == 0
