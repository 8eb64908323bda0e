"""API keys, CORS and reverse proxies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from mmlora.server.api import build_app
from mmlora.server.http.auth import CORS
from mmlora.server.launch import load_served_models
from tests.server.conftest import RunningServer, ServerFactory, run_app

SITE = "https://chat.example"


@pytest.fixture(scope="module")
def server(start_server: ServerFactory) -> RunningServer:
    return start_server(served_model_name=["tiny", "also-tiny"])


@contextmanager
def serving(server: RunningServer, **options: Any) -> Iterator[str]:
    with run_app(build_app(server.llm, load_served_models(server.llm), **options)) as address:
        yield address


def status(address: str, path: str, authorization: bytes | str | None, method: str = "GET") -> int:
    headers = {"authorization": authorization} if authorization is not None else {}
    return httpx.request(method, address + path, headers=headers).status_code  # type: ignore[arg-type]


def test_each_api_key_is_accepted(server: RunningServer) -> None:
    keys = ["one", "clé-à-deux", "a,b"]
    with serving(server, api_key=keys) as address:
        for key in keys:
            assert status(address, "/v1/models", f"Bearer {key}".encode()) == 200
            assert status(address, "/metrics", f"bearer  {key}".encode()) == 200
        for wrong in (None, "", "Bearer", "Bearer on", "Bearer onee", "Basic one", "one", b"Bearer cl\xe9"):
            assert status(address, "/v1/models", wrong) == 401, wrong


def test_all_but_public_paths_need_a_key(server: RunningServer) -> None:
    with serving(server, api_key="key") as address:
        for path in (
            "/v1/models",
            "/metrics",
            "/version",
            "/openapi.json",
            "/tokenize",
            "/nothing",
            "//health",
            "/v1/",
        ):
            assert status(address, path, None) == 401, path
            assert status(address, path, "Bearer key") != 401, path
        for path in ("/v1/chat/completions", "/v1/load_lora_adapter", "/v1/audio/transcriptions"):
            assert status(address, path, None, "POST") == 401, path
        for path in ("/health", "/ready", "/"):
            assert status(address, path, None) != 401, path
        refused = httpx.get(f"{address}/v1/models")
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"


def preflight(address: str, method: str = "POST") -> httpx.Response:
    headers = {
        "origin": SITE,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization",
    }
    return httpx.options(f"{address}/v1/chat/completions", headers=headers)


def test_cross_origin_requests_are_blocked_by_default(server: RunningServer) -> None:
    with serving(server) as address:
        for refused in (preflight(address), httpx.get(f"{address}/v1/models", headers={"origin": SITE})):
            assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers


def test_allowed_origins_get_cors_headers(server: RunningServer) -> None:
    with serving(server, api_key="key", cors=CORS([SITE], ["POST"])) as address:
        allowed = preflight(address)  # without a key: browsers send none with preflight requests
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == SITE
        assert preflight(address, "DELETE").status_code == 400
        refused = httpx.get(f"{address}/v1/models", headers={"origin": SITE})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == SITE
        headers = {"origin": SITE, "authorization": "Bearer key"}
        answer = httpx.get(f"{address}/v1/models", headers=headers)
        assert "x-mmlora-adapter" in answer.headers["access-control-expose-headers"]
        other = httpx.get(f"{address}/v1/models", headers={**headers, "origin": "https://other.example"})
        assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("prefix", ["", "/llm"], ids=["stripped by the proxy", "kept by the proxy"])
def test_root_path_works_whether_the_proxy_strips_it_or_not(server: RunningServer, prefix: str) -> None:
    with serving(server, root_path="/llm", api_key="key") as address:
        assert status(address, f"{prefix}/health", None) == 200
        assert status(address, f"{prefix}/v1/models", None) == 401
        assert status(address, f"{prefix}/v1/models", "Bearer key") == 200
        headers = {"authorization": "Bearer key"}
        assert httpx.get(f"{address}{prefix}/openapi.json", headers=headers).json()["servers"] == [{"url": "/llm"}]


def test_the_base_model_is_served_under_all_its_names(server: RunningServer) -> None:
    for name in ("tiny", "also-tiny"):
        answer = server.ask({"type": "text", "text": "hi"}, model=name)
        assert (answer["model"], answer["lora"]["reason"]) == (name, "none")
    cards = httpx.get(f"{server.address}/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "also-tiny"] and {card["parent"] for card in cards} == {None}
    assert server.ask({"type": "text", "text": "hi"}, model="also-tiny", lora=[])["lora"]["reason"] == "explicit:base"
    with server.client as client:
        assert client.models.retrieve("also-tiny").id == "also-tiny"
