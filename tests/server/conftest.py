"""Servers of a tiny random Phi-4-multimodal, media for requests, and helpers."""

from __future__ import annotations

import base64
import io
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import soundfile
import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from PIL import Image

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.outputs import RequestOutput
from mmlora.server.api import build_app
from mmlora.server.args import LoRAModule, ServerArgs
from mmlora.server.http.listener import format_url, listening
from mmlora.server.http.server import HTTPServer
from mmlora.server.launch import build_server, load_served_models, load_tls
from mmlora.server.lora.served_models import ServedModels
from mmlora.structured_outputs import StructuredOutputsParams

JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class RunningServer:
    """A server that runs in a thread of this process."""

    llm: AsyncLLM
    address: str
    models: ServedModels | None = None

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def ask(self, *parts: dict[str, Any], model: str = "tiny", **options: Any) -> dict[str, Any]:
        """Return the chat completion of one message as a dictionary; greedy, four tokens by default."""
        extra = {name: options.pop(name) for name in ("lora", "top_k", "mm_processor_kwargs") if name in options}
        with self.client as client:
            answer = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": list(parts)}],  # type: ignore[list-item,misc]
                extra_body=extra,
                **{"temperature": 0, "max_tokens": 4, **options},
            )
        return dict(answer.to_dict())


@contextmanager
def run_app(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free port and yield its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not server.started:
                assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class ServerFactory:
    """Starts servers that run until the end of the module."""

    def __init__(self, model: Path, stack: ExitStack) -> None:
        self._model = model
        self._stack = stack

    def __call__(self, *lora_modules: LoRAModule, **options: Any) -> RunningServer:
        options = {"served_model_name": "tiny", "enable_lora": True, "max_loras": 2, "device": "cpu", **options}
        llm = AsyncLLM(EngineArgs.from_kwargs(str(self._model), **options))
        self._stack.callback(llm.shutdown)
        app = build_app(llm, load_served_models(llm, lora_modules))
        return RunningServer(llm, self._stack.enter_context(run_app(app)))


@pytest.fixture(scope="session")
def adapters(tiny_adapters: dict[str, Path]) -> dict[str, str]:
    """Paths of adapters by name: `speech` changes all parts of the model, the others only the language model."""
    return {
        "speech": str(tiny_adapters["everything"]),
        "vision": str(tiny_adapters["a"]),
        "words": str(tiny_adapters["b"]),
    }


@pytest.fixture(scope="module")
def start_server(tiny_phi4: Path) -> Iterator[ServerFactory]:
    with ExitStack() as stack:
        yield ServerFactory(tiny_phi4, stack)


@pytest.fixture(scope="session")
def wav() -> bytes:
    buffer = io.BytesIO()
    samples = 0.3 * np.sin(np.arange(8000) * np.linspace(0.05, 0.3, 8000))
    soundfile.write(buffer, samples.astype(np.float32), 16000, format="WAV")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def png() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (42, 42, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def aborted(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> list[RequestOutput]:
    """Record the terminal outputs of aborted requests."""
    outputs: list[RequestOutput] = []
    abort = server.llm.engine.abort_request

    def record(request_id: str, **options: Any) -> RequestOutput | None:
        output = abort(request_id, **options)
        outputs.extend([output] if output else [])
        return output

    monkeypatch.setattr(server.llm.engine, "abort_request", record)
    return outputs


@pytest.fixture
def say(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the model generate a given text."""
    make = server.llm.engine.default_sampling_params

    def force(text: str) -> None:
        constraint = StructuredOutputsParams(regex=re.escape(text))

        def forced(**options: Any) -> Any:
            return make(**{**options, "structured_outputs": constraint})

        monkeypatch.setattr(server.llm.engine, "default_sampling_params", forced)

    return force


def wait_until_idle(server: RunningServer) -> None:
    wait_for(lambda: not server.llm.engine.has_unfinished_requests)


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def input_audio_part(data: bytes, audio_format: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": audio_format}}


def url_part(kind: str, data: bytes, mime: str) -> dict[str, Any]:
    """Return an `audio_url` or `image_url` part with a data: URL."""
    return {"type": kind, kind: {"url": f"data:{mime};base64,{base64.b64encode(data).decode()}"}}


@contextmanager
def run_server(llm: AsyncLLM, **options: Any) -> Iterator[tuple[HTTPServer, str]]:
    """Serve like `mmlora serve` with these `ServerArgs`; yield the server and its URL; shut the engine down on exit."""
    args = ServerArgs(**({} if "uds" in options else {"port": 0}), **options)
    tls = load_tls(args)
    is_ready = threading.Event()
    server = build_server(llm, load_served_models(llm), args, tls=tls, on_ready=is_ready.set)
    with listening(args.host, args.port, args.uds) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert is_ready.wait(30), "the server did not start"
            yield server, format_url(listener, is_tls=tls is not None, root_path=args.root_path)
        finally:
            server.should_exit = True
            thread.join()


def post_json(url: str, content: bytes | str) -> httpx.Response:
    """Send a body that is declared as JSON, whatever it is."""
    return httpx.post(url, content=content, headers=JSON, timeout=60)


def connect(address: str) -> socket.socket:
    """Open a connection."""
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60)


def read_answer(connection: socket.socket) -> bytes:
    """Read one response that has a `content-length`."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(65536) or pytest.fail(f"closed after {answer!r}")
    head, _, body = answer.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536) or pytest.fail(f"closed after {answer!r}")
    return head + b"\r\n\r\n" + body


@contextmanager
def paused(llm: AsyncLLM) -> Iterator[None]:
    """Pause the engine between two steps."""
    may_continue, is_paused = threading.Event(), threading.Event()

    def wait() -> None:
        is_paused.set()
        assert may_continue.wait(60)

    llm._send(wait)
    assert is_paused.wait(60)
    try:
        yield
    finally:
        may_continue.set()


@contextmanager
def slow_steps(llm: AsyncLLM, seconds: float) -> Iterator[list[float]]:
    """Slow down each step that runs the model and yield the start times of the steps."""
    runner, times = llm.engine.runner, list[float]()
    run = runner.run

    def run_slowly(scheduled: Any) -> Any:
        times.append(time.monotonic())
        time.sleep(seconds)
        return run(scheduled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run", run_slowly)
        yield times


def leave_before_answer(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    """Send a request that takes longer than the client's timeout, and wait until the engine is idle."""
    with slow_steps(server.llm, 0.02) as times:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.address + path, json=body, timeout=httpx.Timeout(60, read=2))
        assert times
        wait_until_idle(server)


@contextmanager
def still_serving(server: RunningServer) -> Iterator[RunningServer]:
    """Check on exit that a server still responds and is idle then."""
    yield server
    assert server.ask(text_part("still there?"))["usage"]["completion_tokens"] == 4
    assert not server.llm.engine.has_unfinished_requests


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.005)


def in_thread(function: Any, *arguments: Any, **options: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments, **options)))
    thread.start()
    return thread, results
