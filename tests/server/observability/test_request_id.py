"""`X-Request-Id` of clients: in the response, in its id, and in the log."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mmlora.server.api import build_app
from mmlora.server.launch import load_served_models
from tests.server.conftest import RunningServer, ServerFactory, run_app, still_serving

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
COMPLETION = {"prompt": ["hi", "ho"], "max_tokens": 2}
RESPONSE = {"input": "hi", "max_output_tokens": 2}
ROUTES = [
    ("/v1/chat/completions", CHAT, "chatcmpl-"),
    ("/v1/completions", COMPLETION, "cmpl-"),
    ("/v1/responses", RESPONSE, "resp_"),
]
GENERATED = re.compile("[0-9a-f]{32}")


@pytest.fixture(scope="module")
def shared_server(start_server: ServerFactory) -> RunningServer:
    return start_server()


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    with still_serving(shared_server):
        yield shared_server


def post(server: RunningServer, path: str, body: dict[str, Any], *given: str) -> httpx.Response:
    headers = [("x-request-id", value) for value in given]
    return httpx.post(server.address + path, json=body, headers=headers, timeout=60)


@pytest.mark.parametrize(("path", "body", "prefix"), ROUTES)
@pytest.mark.parametrize("given", ["a", "A-b_c.9:/+=@", "x" * 128])
def test_a_client_s_id_names_the_response(
    server: RunningServer, path: str, body: dict[str, Any], prefix: str, given: str
) -> None:
    answer = post(server, path, body, given)
    assert answer.headers.get_list("x-request-id") == [given]
    assert answer.json()["id"] == prefix + given


@pytest.mark.parametrize(("path", "body", "prefix"), ROUTES)
@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a,b", "<script>", "a\tb", "%0a", "a;b"])
def test_another_id_is_replaced(
    server: RunningServer, path: str, body: dict[str, Any], prefix: str, given: str
) -> None:
    answer = post(server, path, body, given)
    (request_id,) = answer.headers.get_list("x-request-id")
    assert GENERATED.fullmatch(request_id) and answer.json()["id"] == prefix + request_id


@pytest.mark.parametrize(("path", "body", "prefix"), ROUTES)
def test_the_body_may_have_the_id(server: RunningServer, path: str, body: dict[str, Any], prefix: str) -> None:
    assert post(server, path, {**body, "request_id": "mine"}).json()["id"] == f"{prefix}mine"
    assert post(server, path, {**body, "request_id": "mine"}, "theirs").json()["id"] == f"{prefix}theirs"
    for invalid in ("", "a b", "x" * 129, "a\n"):
        refused = post(server, path, {**body, "request_id": invalid})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "request_id")


def test_ids_may_repeat(server: RunningServer) -> None:
    """Retries and fan-outs send the same id while the first request is still running."""

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.address, timeout=60) as client:
            jobs = [
                client.post(path, json={**body, "ignore_eos": True}, headers={"x-request-id": "same"})
                for path, body, _ in ROUTES * 4
            ]
            return await asyncio.gather(*jobs)

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200] * 12
    assert {answer.json()["id"] for answer in answers} == {prefix + "same" for _, _, prefix in ROUTES}


def test_streams_and_errors_have_the_id(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = post(server, "/v1/chat/completions", {**CHAT, "stream": True}, "s-1")
    assert stream.headers["x-request-id"] == "s-1" and stream.text.count('"id":"chatcmpl-s-1"') > 1
    for path, body, status in (("/v1/chat/completions", {}, 400), ("/nowhere", {}, 404), ("/health", None, 405)):
        answer = post(server, path, body or {}, "e-1")
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "e-1")
    monkeypatch.setattr(server.llm.input_processor, "chat_prompt", lambda *_, **__: 1 / 0)
    answer = post(server, "/v1/chat/completions", CHAT, "e-2")
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (500, ["e-2"])
    with run_app(build_app(server.llm, load_served_models(server.llm), root_path="/llm")) as address:
        behind_proxy = RunningServer(server.llm, f"{address}/llm")
        answer = post(behind_proxy, "/v1/chat/completions", CHAT, "e-3")
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (500, ["e-3"])
    assert answer.json()["error"]["message"] == "internal server error"
    assert GENERATED.fullmatch(httpx.get(f"{server.address}/health").headers["x-request-id"])


def test_the_openai_client_reports_the_id(server: RunningServer) -> None:
    with server.client as client:
        answer = client.chat.completions.create(model="tiny", extra_headers={"X-Request-Id": "mine"}, **CHAT)  # type: ignore[call-overload]
    assert answer._request_id == "mine"


def test_the_log_has_the_id(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mmlora.access"):
        post(server, "/v1/chat/completions", CHAT, "find-me")
    assert re.search(r"request_id=chatcmpl-find-me-[0-9a-f]{8} ", caplog.text)
