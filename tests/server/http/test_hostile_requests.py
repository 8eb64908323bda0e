"""Path traversal, oversized heads and invalid API keys; `docs/security.md` has the measurements."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from mmlora.server.api import build_app
from mmlora.server.launch import load_served_models
from tests.server.conftest import RunningServer, connect, run_app, still_serving, text_part
from tests.server.lora.admin import leave_nothing, load, names, run_updatable, unload
from tests.server.resource_limits import MIB, bounded

PATHS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\etc\\passwd",
    "file:///etc/passwd",
    "....//....//etc",
    "\0/etc",
    "~",
]
HEADER_BYTES = 100 * MIB


@pytest.fixture(scope="module")
def shared_server(tiny_phi4: Path, adapters: dict[str, str]) -> Iterator[RunningServer]:
    with run_updatable(tiny_phi4, adapters) as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    """The server, whose state must be unchanged after the test."""
    with leave_nothing(shared_server), still_serving(shared_server):
        yield shared_server


@pytest.mark.parametrize("name", PATHS)
def test_a_model_name_is_never_a_path(server: RunningServer, name: str) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    for fields in ({"model": name}, {"lora": name}, {"lora": [{"name": name}]}):
        response = httpx.post(f"{server.address}/v1/completions", json={**body, **fields}, timeout=60)
        assert response.status_code == 404, response.text
        assert response.json()["error"]["code"] in ("model_not_found", "adapter_not_found")
    assert unload(server, lora_name=name).status_code == 404


@pytest.mark.parametrize(
    "path",
    ["..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "../../../etc/passwd", "%2fetc%2fpasswd", "..%5cetc", "%00"],
)  # fmt: skip
@pytest.mark.parametrize("route", ["v1/models/", "", "health/", "metrics/"])
def test_url_paths_never_reach_files(server: RunningServer, route: str, path: str) -> None:
    answer = send(server, f"GET /{route}{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404") and b"root:" not in answer


def test_an_adapter_name_that_looks_like_a_path_is_only_a_name(
    server: RunningServer, adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("../../evil", "/etc/passwd", "a/../b"):
        assert load(server, lora_name=name, lora_path=adapters["words"]).status_code == 200
        assert name in names(server)
        assert server.ask(text_part("x"), model=name)["model"] == name
        assert unload(server, lora_name=name).status_code == 200
    assert not list(tmp_path.iterdir()) and not (tmp_path.parent.parent / "evil").exists()


@pytest.mark.parametrize(
    "path",
    ["/etc", "/etc/passwd", "../../../../../etc", "/proc/self", "/dev", "/dev/zero", "/", "..", "a\0b", "~root"],
)  # fmt: skip
def test_a_path_without_an_adapter_is_refused(server: RunningServer, path: str) -> None:
    with bounded(f"lora_path {path!r}"):
        response = load(server, lora_name="evil", lora_path=path)
    assert 400 <= response.status_code < 500, response.text
    assert "root:" not in response.text and "evil" not in names(server)


@pytest.mark.parametrize("kind", ["pipe", "endless device", "link to a secret"])
def test_adapter_files_must_be_regular_files(server: RunningServer, tmp_path: Path, kind: str) -> None:
    (tmp_path / "secret").write_text("the secret word")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = tmp_path / name
        if kind == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to("/dev/zero" if kind == "endless device" else "secret")
    with bounded(f"adapter files: {kind}"):
        response = load(server, lora_name="evil", lora_path=str(tmp_path))
    assert 400 <= response.status_code < 500 and "the secret word" not in response.text


@pytest.mark.parametrize("case", ["one header", "many headers", "request line", "name of a header"])
def test_a_head_of_100_mb_is_refused_early(server: RunningServer, case: str) -> None:
    start, piece = {
        "one header": (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Long: ", b"a" * 65536),
        "many headers": (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", b"X-Many: a\r\n" * 6000),
        "request line": (b"GET /v1/models/", b"a" * 65536),
        "name of a header": (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", b"X" * 65536),
    }[case]
    num_sent, answer = 0, b""
    with bounded(f"head of 100 MB, {case}"), connect(server.address) as connection:
        with suppress(OSError):  # the server has closed the connection
            connection.sendall(start)
            while num_sent < HEADER_BYTES:
                connection.sendall(piece)
                num_sent += len(piece)
        with suppress(OSError):
            answer = connection.recv(65536)
    print(f"{num_sent / MIB:.1f} MiB were sent")
    assert num_sent < 16 * MIB  # no more than the socket buffers of both ends
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4",))


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_a_malformed_head_is_refused(server: RunningServer, head: bytes) -> None:
    assert send(server, head + b"\r\n\r\n").startswith((b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 501"))


HEAVY: dict[str, tuple[dict[str, Any], str]] = {
    "values": ({"metadata": [[]] * 600_000}, "at most 1048576 are allowed"),
    "fields of stream_options": ({"stream": True, "stream_options": dict.fromkeys(map(str, range(10**5)))}, "100000"),
    "cache_salt": ({"cache_salt": "a" * 1025}, "1025 characters; the limit is 1024"),
    "stop_token_ids": ({"stop_token_ids": [1] * 1025}, "1025 tokens; the limit is 1024"),
    "digits": ({"n": 10**4000}, "n=1000"),
    "two limits": ({"max_tokens": 10**4000, "max_completion_tokens": 10**4000 + 1}, "differ"),
    "biases": ({"logit_bias": {"x" * 10**6: 1}}, "logit_bias="),
    "wrong schema": ({"structured_outputs": {"json": "[" + "1," * 1000 + "1]"}}, "must be an object"),
}


@pytest.mark.parametrize("case", HEAVY)
def test_excessive_values_get_a_short_error(server: RunningServer, case: str) -> None:
    fields, text = HEAVY[case]
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **fields}
    response = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 400 and text in response.json()["error"]["message"], response.text[:500]
    assert len(response.text) < 500


def test_a_form_field_with_json_has_the_limits_of_a_json_body(server: RunningServer, wav: bytes) -> None:
    address, form = f"{server.address}/v1/audio/transcriptions", {"lora": "[" + "{}," * 600_000 + "{}]"}
    response = httpx.post(address, data=form, files={"file": wav}, timeout=60)
    assert response.status_code == 400 and "at most 1048576 are allowed" in response.json()["error"]["message"]


def test_every_route_needs_the_api_key(server: RunningServer) -> None:
    app = build_app(server.llm, load_served_models(server.llm), api_key="key", allow_lora_updates=True)
    tokens: list[dict[str, Any]] = [
        {}, {"authorization": "Bearer"}, {"authorization": "Bearer ke"}, {"authorization": "Bearer KEY"},
        {"authorization": "Basic a2V5"}, {"authorization": "key"}, {"authorization": b"Bearer k\xc3\xa9y"},
        {"authorization": "Bearer " + "k" * 60000},
    ]  # fmt: skip
    calls = [(method, path) for path, methods in app.openapi()["paths"].items() for method in methods]
    calls += [("get", "/metrics"), ("get", "/openapi.json?token=key")]
    open_paths = {"/health", "/ready"}
    with run_app(app) as address, httpx.Client(base_url=address) as client:
        for method, path in calls:
            for headers in tokens:
                status = client.request(method, path.replace("{name}", "tiny"), headers=headers).status_code
                assert (status == 401) == (path not in open_paths), (method, path, headers, status)
        assert client.get("/v1/models", headers={"authorization": "bearer  key"}).status_code == 200
    assert {"/v1/chat/completions", "/v1/load_lora_adapter", "/v1/models/{name}", "/tokenize"} <= {p for _, p in calls}


def send(server: RunningServer, request: bytes) -> bytes:
    """Send raw bytes and return all data until the server closes the connection."""
    answer = b""
    with connect(server.address) as connection:
        connection.sendall(request)
        with suppress(OSError):
            while received := connection.recv(65536):
                answer += received
    return answer
