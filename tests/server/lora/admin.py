"""Helpers of the tests of adapter updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.server.api import build_app
from mmlora.server.args import LoRAModule
from mmlora.server.launch import load_served_models
from tests.server.conftest import RunningServer, run_app, wait_for

BASE_NAMES = ["tiny", "audio", "started"]


@contextmanager
def run_updatable(tiny_phi4: Path, adapters: dict[str, str]) -> Iterator[RunningServer]:
    """Run a server with a default adapter for audio and an adapter of the command line, `started`."""
    options: dict[str, Any] = {"served_model_name": "tiny", "enable_lora": True, "max_loras": 2, "device": "cpu"}
    llm = AsyncLLM(EngineArgs(str(tiny_phi4), default_mm_loras={"audio": adapters["speech"]}, **options))
    models = load_served_models(llm, [LoRAModule("started", adapters["vision"], "parent-model")])
    with run_app(build_app(llm, models, allow_lora_updates=True)) as address:
        yield RunningServer(llm, address, models)
    llm.shutdown()


@contextmanager
def leave_nothing(shared: RunningServer) -> Iterator[None]:
    """On exit, unload what the test loaded and check that the server has its former state and memory."""
    num_bytes = shared.llm.engine.lora.cache.num_bytes
    yield
    for name in names(shared):
        if name not in BASE_NAMES:
            assert unload(shared, lora_name=name).status_code == 200
    wait_for(lambda: shared.llm.engine.lora.cache.num_bytes == num_bytes)
    assert names(shared) == BASE_NAMES
    assert [info.name for info in shared.llm.engine.list_loras()] == ["started"]


def load(server: RunningServer, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.address}/v1/load_lora_adapter", json=body, timeout=60)


def unload(server: RunningServer, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.address}/v1/unload_lora_adapter", json=body, timeout=60)


def chat(server: RunningServer, model: str, **fields: Any) -> httpx.Response:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0,
        "max_tokens": 3,
        "model": model,
        **fields,
    }
    return httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60)


def complete(server: RunningServer, model: str) -> httpx.Response:
    body = {"prompt": ["hi", "ho"], "temperature": 0, "max_tokens": 3, "model": model}
    return httpx.post(f"{server.address}/v1/completions", json=body, timeout=60)


def names(server: RunningServer) -> list[str]:
    return [card["id"] for card in httpx.get(f"{server.address}/v1/models").json()["data"]]


def card(server: RunningServer, name: str) -> dict[str, Any]:
    return dict(httpx.get(f"{server.address}/v1/models/{name}").json())


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)
