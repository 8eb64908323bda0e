"""Media that take forever to decode: text requests, time limits, disconnects and the end of the server."""

from __future__ import annotations

import base64
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import wait_for
from tests.server_process import ServerProcess, run_serve

TEXT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "ignore_eos": True}


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def stop_workers(server: ServerProcess) -> list[int]:
    """Stop the workers of a server, as if they decoded forever."""
    workers = children(server.process.pid)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    return workers


@pytest.fixture
def picture_chat(png: bytes) -> dict[str, Any]:
    url = f"data:;base64,{base64.b64encode(png).decode()}"
    return {**TEXT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def post(server: ServerProcess, body: dict[str, Any], timeout_s: float = 60) -> httpx.Response:
    return httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=timeout_s)


@pytest.fixture(scope="module")
def server(tiny_phi4: Path) -> Iterator[ServerProcess]:
    options = ["--device", "cpu", "--media-decode-workers", "2", "--request-timeout", "2"]
    with run_serve(str(tiny_phi4), *options) as server:
        yield server


def test_text_is_served_while_all_workers_are_busy(server: ServerProcess, picture_chat: dict[str, Any]) -> None:
    stop_workers(server)
    with ThreadPoolExecutor(12) as pool:
        pictures = [pool.submit(post, server, picture_chat) for _ in range(12)]
        time.sleep(0.3)
        start_s = time.monotonic()
        for _ in range(5):
            assert post(server, TEXT).status_code == 200
        assert not any(picture.done() for picture in pictures) and time.monotonic() - start_s < 2
        assert httpx.get(f"{server.address}/health").status_code == 200
        assert {picture.result().status_code for picture in pictures} == {504}  # --request-timeout
    assert post(server, picture_chat).status_code == 200


def test_clients_that_leave_free_the_workers(server: ServerProcess, picture_chat: dict[str, Any]) -> None:
    stopped, start_s = stop_workers(server), time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        for leaving in [pool.submit(post, server, picture_chat, 0.5) for _ in range(4)]:
            with pytest.raises(httpx.ReadTimeout):
                leaving.result()
    wait_for(lambda: not any(map(is_running, stopped)))
    assert time.monotonic() - start_s < 15, "before --media-decode-timeout"
    assert post(server, picture_chat).status_code == 200


def test_sigterm_ends_the_server_while_media_are_decoded(tiny_phi4: Path, picture_chat: dict[str, Any]) -> None:
    options = ["--device", "cpu", "--media-decode-workers", "2", "--drain-timeout", "0.5"]
    with run_serve(str(tiny_phi4), *options) as server:
        workers = stop_workers(server)
        with ThreadPoolExecutor(8) as pool:
            pictures = [pool.submit(post, server, picture_chat) for _ in range(8)]
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
            assert {picture.result().status_code for picture in pictures} == {503}
    assert not any(map(is_running, workers))


def test_no_worker_outlives_a_killed_server(tiny_phi4: Path) -> None:
    with run_serve(str(tiny_phi4), "--device", "cpu", "--media-decode-workers", "2") as server:
        workers = children(server.process.pid)
        assert len(workers) == 2
        server.process.kill()
        wait_for(lambda: not any(map(is_running, workers)))
