"""Requests that a browser sends for web pages: their origin, the host that they address, and the type of their body.

`test_browser_attacks.py` sends them with a browser.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.errors import ConfigError
from mmlora.server.api import build_app
from mmlora.server.args import ServerArgs
from mmlora.server.http.auth import CORS
from mmlora.server.http.listener import is_loopback
from mmlora.server.http.origins import is_own_origin
from mmlora.server.launch import allowed_hosts, load_served_models, warn_if_exposed
from tests.server.conftest import RunningServer, connect, run_app, run_server
from tests.server.lora.admin import leave_nothing, run_updatable

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/responses": {"input": "hi", "max_output_tokens": 1},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
    "/v1/load_lora_adapter": {"lora_name": "new", "lora_path": "/nothing"},
    "/v1/unload_lora_adapter": {"lora_name": "started"},
}
FORM = "/v1/audio/transcriptions"
FOREIGN: list[dict[str, str]] = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://127.0.0.1"},
    {"origin": "http://127.0.0.1:1"},
    {"origin": "http://localhost.evil.example"},
    {"origin": "chrome-extension://abcdef"},
    {"origin": "http://["},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
    {"sec-fetch-site": "something new"},
]


@pytest.fixture(scope="module")
def shared(tiny_phi4: Path, adapters: dict[str, str]) -> Iterator[RunningServer]:
    with run_updatable(tiny_phi4, adapters) as shared:
        yield shared


@pytest.fixture
def server(shared: RunningServer) -> Iterator[RunningServer]:
    with leave_nothing(shared):
        yield shared


@contextmanager
def untouched(server: RunningServer) -> Iterator[None]:
    """Check on exit that the engine received no request, and that no adapter was loaded or unloaded."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("encode", "prepare", "change_loras", "run_in_pool"):
            patch.setattr(server.llm, name, lambda *_, name=name, **__: seen.append(name))
        yield
    assert seen == []


@contextmanager
def serving(server: RunningServer, **options: Any) -> Iterator[str]:
    models = load_served_models(server.llm)
    with run_app(build_app(server.llm, models, allow_lora_updates=True, **options)) as address:
        yield address


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain", "text/plain;charset=UTF-8", "text/plain; application/json", "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=application/json", "text/json", "application/jsonp", "application/", "json",
        "", None,
    ],
)  # fmt: skip
def test_a_body_must_be_declared_as_json(server: RunningServer, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    with untouched(server):
        for path, body in BODIES.items():
            for content in (json.dumps(body).encode(), iter([json.dumps(body).encode()])):
                response = httpx.post(server.address + path, content=content, headers=headers)
                assert response.status_code == 415, (path, response.text)
                error = response.json()["error"]
                assert "'Content-Type: application/json'" in error["message"]
                assert error["code"] == "unsupported_media_type"
                assert repr(kind) in error["message"] if kind is not None else "received none" in error["message"]


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON; charset=utf-8", "application/json;", "application/vnd.api+json ; v=1"],
)
def test_json_types_are_accepted(server: RunningServer, kind: str) -> None:
    body = json.dumps(BODIES["/v1/completions"])
    assert httpx.post(f"{server.address}/v1/completions", content=body, headers={"content-type": kind}).is_success


def test_a_request_without_a_body_needs_no_type(server: RunningServer) -> None:
    for path in BODIES:
        response = httpx.post(server.address + path)
        assert response.status_code == 400 and "not JSON" in response.json()["error"]["message"], path


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_requests_of_foreign_pages_are_refused_on_every_route(
    server: RunningServer, wav: bytes, headers: dict[str, str]
) -> None:
    with untouched(server), httpx.Client(base_url=server.address, headers=headers, timeout=60) as client:
        responses = [client.post(path, json=body) for path, body in BODIES.items()]
        responses += [client.post(FORM, files={"file": wav}), client.post("/nothing")]
        responses += [client.request(method, "/v1/models") for method in ("GET", "PUT", "DELETE", "OPTIONS")]
        responses += [client.get(path) for path in ("/", "/health", "/metrics", "/openapi.json")]
    for response in responses:
        assert response.status_code == 403, response.request
        error = response.json()["error"]
        assert error["code"] == "origin_not_allowed" and "--allowed-origins" in error["message"]
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "{own}"},
        {"origin": "{own}", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"origin": "https://llm.example", "sec-fetch-site": "same-origin"},  # a proxy has changed `Host`
        {"origin": "https://llm.example", "host": "llm.example"},  # a proxy has added TLS
        {"origin": "https://llm.example", "host": "llm.example:443"},
        {"origin": "https://LLM.example:8443", "host": "llm.example:8443"},
    ],
    ids=str,
)
def test_own_pages_and_other_clients_are_served(server: RunningServer, headers: dict[str, str]) -> None:
    headers = {name: value.format(own=server.address) for name, value in headers.items()}
    response = httpx.post(f"{server.address}/v1/completions", json=BODIES["/v1/completions"], headers=headers)
    assert response.status_code == 200, response.text


def test_a_link_opens_a_page_but_sends_no_form(server: RunningServer) -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert httpx.get(server.address, headers=headers).status_code == 200
    with untouched(server):
        assert httpx.post(f"{server.address}{FORM}", files={"file": b"x"}, headers=headers).status_code == 403


@pytest.mark.parametrize(
    ("origin", "scheme", "host", "is_own"),
    [
        ("http://h:8000", "http", "h:8000", True),
        ("http://h", "http", "h:80", True),
        ("https://h:443", "https", "h", True),
        ("https://h", "http", "h", True),
        ("http://[::1]:8000", "http", "[::1]:8000", True),
        ("http://h", "https", "h", False),
        ("http://h", "http", "h:8000", False),
        ("http://h:8000", "http", "g:8000", False),
        ("ftp://h", "http", "h", False),
        ("http://", "http", "", False),
        ("http://h:x", "http", "h:x", False),
        ("http://h, http://h", "http", "h", False),
    ],
)
def test_the_own_origin_has_the_host_and_port_of_the_request(origin: str, scheme: str, host: str, is_own: bool) -> None:
    assert is_own_origin(origin, scheme, host) == is_own


def test_allowed_origins_are_served_and_others_are_not(server: RunningServer) -> None:
    body = BODIES["/v1/completions"]
    with serving(server, cors=CORS(["https://chat.example"])) as address:
        for origin, site, status in (
            ("https://chat.example", "cross-site", 200),
            ("https://chat.example", None, 200),
            ("https://chat.example:444", None, 403),
            ("https://evil.example", "cross-site", 403),
            ("null", "cross-site", 403),
        ):
            headers = {"origin": origin, **({"sec-fetch-site": site} if site else {})}
            response = httpx.post(f"{address}/v1/completions", json=body, headers=headers)
            assert response.status_code == status, (origin, site)
            assert (response.headers.get("access-control-allow-origin") == origin) == (status == 200)
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        for origin, status in (("https://chat.example", 200), ("https://evil.example", 400)):
            headers = {"origin": origin, "sec-fetch-site": "cross-site", **asked}
            assert httpx.options(f"{address}/v1/completions", headers=headers).status_code == status
    with serving(server, cors=CORS(["*"])) as address:
        for headers in FOREIGN:
            assert httpx.post(f"{address}/v1/completions", json=body, headers=headers).status_code == 200


def test_a_foreign_page_is_refused_even_with_an_api_key(server: RunningServer) -> None:
    with serving(server, api_key="key") as address:
        headers = {"authorization": "Bearer key", "origin": "https://evil.example"}
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 403
        del headers["origin"]
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200


@pytest.fixture(scope="module")
def local(tiny_phi4: Path) -> Iterator[str]:
    """Address of a server with the default options: on a loopback address, without an API key."""
    llm = AsyncLLM(EngineArgs(str(tiny_phi4), served_model_name="tiny", max_model_len=64, device="cpu"))
    with run_server(llm, uvicorn_log_level="error") as (_, address):
        yield address


@pytest.mark.parametrize(
    "host",
    [
        "evil.test", "evil.test:8000", "127.0.0.1.evil.test", "localhost.evil.test", "evil-localhost", "x", "10.1.2.3",
        "0.0.0.0", "[::2]", "[::1", "localhost:80:80", "user@localhost", "2130706433", "", "localhost, evil.test",
        "127.0.0.1/", "*",
    ],
)  # fmt: skip
def test_a_rebound_host_name_is_refused_on_every_route(local: str, host: str) -> None:
    with httpx.Client(base_url=local, headers={"host": host}) as client:
        paths = ("/", "/health", "/metrics", "/v1/models", "/playground/app.js", "/nothing")
        responses = [*map(client.get, paths), client.post("/v1/completions", json=BODIES["/v1/completions"])]
    for response in responses:
        assert response.status_code == 421, response.request
        error = response.json()["error"]
        assert error["code"] == "host_not_allowed" and "--allowed-hosts" in error["message"]


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "localhost.", "127.0.0.1", "127.0.0.1:9000", "[::1]", "[::1]:8000", "127.9.9.9"],
)
def test_local_names_are_served(local: str, host: str) -> None:
    assert httpx.get(f"{local}/v1/models", headers={"host": host}).status_code == 200


def test_http_1_0_without_host_is_served_and_two_hosts_are_not(local: str) -> None:
    assert raw(local, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert raw(local, b"GET /health HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400")
    two = b"Host: localhost\r\nHost: evil.test\r\nConnection: close\r\n\r\n"
    assert raw(local, b"GET /health HTTP/1.1\r\n" + two).startswith(b"HTTP/1.1 400")
    absolute = b"GET http://evil.test/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert raw(local, absolute).startswith(b"HTTP/1.1 404")


def raw(address: str, request: bytes) -> bytes:
    """Return the first bytes of the response to raw bytes."""
    with connect(address) as connection:
        connection.sendall(request)
        return connection.recv(65536)


@pytest.mark.parametrize(
    ("options", "allowed", "refused"),
    [
        ({}, ["localhost", "127.0.0.1", "::1"], ["llm.example", "10.1.2.3"]),
        ({"host": "::1"}, ["localhost", "::1"], ["llm.example"]),
        ({"allowed_hosts": ["llm.example"]}, ["llm.example", "localhost"], ["a.llm.example", "10.1.2.3"]),
        (
            {"allowed_hosts": ["*.LLM.example"]},
            ["a.llm.example", "a.b.llm.example"],
            ["llm.example", "evilllm.example"],
        ),
        ({"allowed_hosts": ["[fd00::1]", "10.1.2.3"]}, ["fd00::1", "10.1.2.3"], ["fd00::2", "10.1.2.4"]),
        ({"allowed_hosts": ["*"]}, ["evil.test", ""], []),
        ({"host": "0.0.0.0", "allowed_hosts": ["llm.example"]}, ["llm.example", "10.1.2.3", "::2"], ["localhost", "x"]),
        ({"api_key": "k", "allowed_hosts": ["llm.example"]}, ["llm.example", "localhost"], ["evil.test"]),
        ({"uds": "s", "allowed_hosts": ["llm.example"]}, ["llm.example", "127.0.0.1"], ["localhost"]),
    ],
    ids=str,
)
def test_the_allowed_hosts_of_a_server(options: dict[str, Any], allowed: list[str], refused: list[str]) -> None:
    hosts = allowed_hosts(ServerArgs(**options))
    assert hosts is not None
    assert [host for host in allowed + refused if host in hosts] == allowed


@pytest.mark.parametrize("options", [{"host": "0.0.0.0"}, {"host": "::"}, {"api_key": "k"}, {"uds": "s"}], ids=str)
def test_elsewhere_all_hosts_are_allowed_without_the_option(options: dict[str, Any]) -> None:
    assert allowed_hosts(ServerArgs(**options)) is None


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "192.0.2.1"}, True),
        ({"host": "0.0.0.0", "api_key": "k"}, False),
        ({"host": "0.0.0.0", "allowed_hosts": ["llm.example"]}, False),
        ({"uds": "s"}, False),
    ],
    ids=str,
)
def test_an_open_server_on_a_public_address_warns(
    options: dict[str, Any], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_if_exposed(ServerArgs(**options))
    assert [("--api-key" in text, "--allowed-hosts" in text) for text in caplog.messages] == [(True, True)] * warns


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"allowed_origins": ["https://chat.example/"]}, "'https://chat.example/' must be scheme://host"),
        ({"allowed_origins": ["*", "chat.example"]}, "'chat.example'"),
        ({"allowed_origins": ["https://Chat.example"]}, "'https://Chat.example'"),
        ({"allowed_origins": ["https://*.example"]}, "'https://\\*.example'"),
        ({"allowed_hosts": ["http://llm.example"]}, "'http://llm.example' must be a host name"),
        ({"allowed_hosts": ["llm.example:8000"]}, "'llm.example:8000'"),
        ({"allowed_hosts": [""]}, "''"),
        ({"allowed_hosts": ["a.*"]}, "'a.\\*'"),
    ],
    ids=str,
)
def test_an_origin_or_host_that_never_matches_is_a_config_error(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ServerArgs(**options)


def test_a_server_on_all_addresses_serves_every_host(tiny_phi4: Path) -> None:
    """A kubelet and Prometheus address a server by the IP address of its pod."""
    llm = AsyncLLM(EngineArgs(str(tiny_phi4), served_model_name="tiny", max_model_len=64, device="cpu"))
    with run_server(llm, host="0.0.0.0", uvicorn_log_level="error") as (_, address):
        local = f"http://127.0.0.1:{urlsplit(address).port}"
        for host in ("10.244.0.17:8000", "mmlora.default.svc.cluster.local"):
            for path in ("/health", "/ready", "/metrics"):
                assert httpx.get(local + path, headers={"host": host}).status_code == 200


def test_the_address_that_a_name_resolves_to_decides_whether_it_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"this-machine": "127.0.1.1", "elsewhere": "192.0.2.7"}

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (addresses[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert is_loopback("this-machine") and not is_loopback("elsewhere")
