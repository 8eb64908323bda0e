"""`/ready` and `/version`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

import mmlora
from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.server.api import build_app
from mmlora.server.launch import load_served_models
from tests.server.conftest import RunningServer, run_app


def start(tiny_phi4: Path) -> AsyncLLM:
    return AsyncLLM(EngineArgs(str(tiny_phi4), served_model_name="tiny", max_model_len=64, device="cpu"))


def ready(address: str) -> tuple[int, Any]:
    response = httpx.get(f"{address}/ready")
    return response.status_code, response.json()


def test_ready_until_the_shutdown(tiny_phi4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = start(tiny_phi4)
    with run_app(build_app(llm, load_served_models(llm), api_key="key")) as address:
        assert ready(address) == (200, {"status": "ready"})
        may_end, has_begun = threading.Event(), threading.Event()

        def step() -> None:
            has_begun.set()
            may_end.wait(30)

        llm._send(step)
        assert has_begun.wait(30)
        stopping = threading.Thread(target=llm.shutdown)
        stopping.start()
        while ready(address)[0] == 200:
            assert stopping.is_alive()
        assert llm.is_alive and ready(address) == (503, {"status": "shutting down"})
        may_end.set()
        stopping.join(30)
        assert ready(address) == (503, {"status": "shutting down"})
        assert httpx.get(f"{address}/health").status_code == 503


def test_not_ready_with_a_dead_engine(tiny_phi4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = start(tiny_phi4)

    def fail(**_: object) -> None:
        raise SystemError("broken on purpose")

    with run_app(build_app(llm, load_served_models(llm))) as address:
        monkeypatch.setattr(llm.engine, "step", fail)
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        assert httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).status_code == 503
        assert ready(address) == (503, {"status": "dead"})
    llm.shutdown()


def test_the_version_needs_the_api_key(tiny_phi4: Path) -> None:
    llm = start(tiny_phi4)
    try:
        with run_app(build_app(llm, load_served_models(llm), api_key="key")) as address:
            server = RunningServer(llm, address)
            assert httpx.get(f"{server.address}/version").status_code == 401
            answer = httpx.get(f"{server.address}/version", headers={"authorization": "Bearer key"})
            assert (answer.status_code, answer.json()) == (200, {"version": mmlora.__version__})
    finally:
        llm.shutdown()
