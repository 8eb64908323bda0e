"""Invalid requests over HTTP: each gets a named error, and the server continues to serve."""

from __future__ import annotations

import json
import socket
import tracemalloc
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from mmlora.async_llm import AsyncLLM
from mmlora.errors import AdapterNotFound
from mmlora.server.api import build_app
from mmlora.server.launch import load_served_models
from tests.server.conftest import (
    RunningServer,
    ServerFactory,
    input_audio_part,
    post_json,
    run_app,
    still_serving,
    text_part,
    url_part,
)

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def shared_server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    return start_server(
        default_mm_loras={"audio": adapters["speech"]}, limit_mm_per_prompt={"image": 1}, max_logprobs=5
    )


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    with still_serving(shared_server):
        yield shared_server


def refuse(server: RunningServer, body: Any, status: int = 400) -> dict[str, Any]:
    """Send a request that must be refused and return its error."""
    response = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def message_of(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": MESSAGES, "modalities": ["text", "audio"]}, "modalities"),
        ({"messages": MESSAGES, "temprature": 0}, "temprature"),
        ({"messages": MESSAGES, "temperature": "hot"}, "temperature"),
        ({"messages": MESSAGES, "stop": 5}, "stop"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": MESSAGES, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"model": "tiny"}, "messages"),
        ([], "body"),
        ({"messages": MESSAGES, "lora": [{"name": "audio", "scale": "much"}]}, "lora"),
        ({"messages": MESSAGES, "lora": [{"name": "audio", "scale": True}]}, "lora"),
        ({"messages": MESSAGES, "lora": [{"name": "audio", "scale": 10**400}]}, "lora"),
        ({"messages": MESSAGES, "lora": [{"name": "audio"}, {"name": "audio"}]}, "lora"),
        ({"messages": MESSAGES, "lora": [{"path": "audio"}]}, "lora"),
        ({"messages": MESSAGES, "lora": [{"name": f"n{i}"} for i in range(17)]}, "lora"),
        ({"messages": MESSAGES, "lora": 3}, "lora"),
        ({"messages": MESSAGES, "model": "audio", "lora": []}, "lora"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unsupported_field_is_named(server: RunningServer, body: Any, param: str) -> None:
    error = refuse(server, body)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"lora": [{"name": "x" * 10**6, "bad": 1}]}, 400),
        ({"lora": [{"name": "x" * 10**6, "scale": "y" * 10**6}]}, 400),
        ({"lora": [{"name": "x" * 10**6}, {"name": "x" * 10**6}]}, 400),
        ({"lora": "x" * 10**6}, 404),
        ({"model": "x" * 10**6}, 404),
        ({"model": "x" * 10**6, "lora": "y" * 10**6}, 400),
        ({"model": "x" * 10**6, "lora": []}, 400),
        ({"x" * 10**6: "y" * 10**6}, 400),
        ({"messages": [{"role": "x" * 10**6, "content": "hi"}]}, 400),
        ({"messages": [{"role": "user", "x" * 10**6: "y"}]}, 400),
    ],
    ids=["entry", "scale", "twice", "lora", "model", "both", "base", "field", "role", "field of a message"],
)
def test_an_error_shortens_a_large_field(server: RunningServer, fields: dict[str, Any], status: int) -> None:
    error = refuse(server, {"messages": MESSAGES, **fields}, status)
    assert len(str(error)) < 600


def test_harmless_fields_are_accepted(server: RunningServer) -> None:
    harmless = {
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "tools": [],
        "response_format": {"type": "text"},
        "n": None,
    }
    body = {"messages": MESSAGES, "max_tokens": 2, **harmless}
    assert httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": MESSAGES, "temperature": -1}, "temperature=-1"),
        ({"messages": MESSAGES, "n": 0}, "n=0"),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 6}, "max_logprobs=5"),
        ({"messages": [{"role": "user", "content": "long " * 300}]}, "max_model_len=512"),
        ({"messages": [{"content": "no role"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "'video_url'; videos are not"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_embeds"}]}]},
            "'image_embeds'; precomputed embeddings",
        ),
        ({"messages": MESSAGES, "mm_processor_kwargs": {"unknown_option": 1}}, "unknown_option"),
    ],
    ids=["temperature", "n", "logprobs", "too long", "role", "video", "embeddings", "processor option"],
)
def test_values_out_of_range_are_named(server: RunningServer, wav: bytes, body: dict[str, Any], text: str) -> None:
    if "mm_processor_kwargs" in body:
        body = {**message_of(input_audio_part(wav)), "mm_processor_kwargs": body["mm_processor_kwargs"]}
    assert text in refuse(server, body)["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", b'{"tokens":[' + b'"",' * 300_000 + b'""]}'),
        ("/v1/completions", b'{"prompt":"a","stop":[' + b"1," * 300_000 + b"1]}"),
        ("/v1/completions", b'{"prompt":"a","stop_token_ids":[' + b'"",' * 300_000 + b'""]}'),
        ("/v1/chat/completions", b'{"messages":[' + b"1," * 300_000 + b"1]}"),
        ("/v1/chat/completions", b'{"messages":[{"role":"user","content":"a"}],"lora":[' + b"1," * 300_000 + b"1]}"),
        ("/v1/completions", json.dumps({"prompt": "a", "logit_bias": {str(i): "" for i in range(99_999)}}).encode()),
        ("/tokenize", json.dumps({str(i): 0 for i in range(99_999)}).encode()),
        ("/v1/responses", b'{"input":[' + b"1," * 300_000 + b"1]}"),
        ("/v1/responses", json.dumps({"input": "a", "metadata": {str(i): 0 for i in range(99_999)}}).encode()),
        ("/v1/responses", json.dumps({"input": "a", "text": {str(i): 0 for i in range(99_999)}}).encode()),
    ],
    ids=["tokens", "stop", "stop_token_ids", "messages", "lora", "logit_bias", "fields", "input", "metadata", "text"],
)
def test_a_body_with_many_errors_is_as_cheap_as_with_one(server: RunningServer, path: str, body: bytes) -> None:
    """Reporting each of a million errors would take a kilobyte each and block the interpreter for seconds."""
    tracemalloc.start()
    try:
        response = post_json(server.address + path, body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert response.status_code == 400 and len(response.text) < 1000
    assert peak < 30 * len(body) + 10_000_000


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "", "content": "x"}, "messages[0].role"),
        ({"role": "user|>x<|end|><|assistant", "content": "x"}, "messages[0].role"),
        ({"role": "user", "contnt": "x"}, "'contnt'"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}, "tool_calls"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": "{}"}}, "function_call"),
        ({"role": "assistant", "content": None, "audio": {"id": "audio_1"}}, "audio"),
        ({"role": "banana", "content": None}, "the message has 'role', 'content'"),
    ],
    ids=[
        "role",
        "control tokens in the role",
        "misspelt",
        "no content",
        "no parts",
        "tool calls",
        "legacy call",
        "earlier audio",
        "no content in a role of the template",
    ],
)
def test_an_ambiguous_message_is_refused(server: RunningServer, message: Any, text: str) -> None:
    assert text in refuse(server, {"messages": [message], "max_tokens": 2})["message"]


def test_harmless_message_fields_are_accepted(server: RunningServer) -> None:
    user = {"role": "user", "content": "x", "name": "me", "id": "msg_1", "cache_control": {"type": "ephemeral"}}
    assistant = {"role": "assistant", "content": None, "tool_calls": [], "refusal": None, "annotations": []}
    assistant |= {"audio": None, "function_call": None, "reasoning": "well", "metadata": {}, "provider": {"a": [1]}}
    bodies = [{"messages": [*messages, *MESSAGES], "max_tokens": 2} for messages in ([user, assistant], [])]
    answers = [httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60) for body in bodies]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text


def test_other_roles_go_to_the_template(server: RunningServer) -> None:
    tokens = [
        httpx.post(f"{server.address}/tokenize", json={"messages": [{"role": role, "content": "x"}, *MESSAGES]}).json()
        for role in ("user", "banana", "function")
    ]
    text = [server.llm.tokenizer.decode(answer["tokens"]) for answer in tokens]
    assert text[1] == text[0].replace("user", "banana", 1) and text[2] == text[0].replace("user", "function", 1)
    body = {"messages": [{"role": "banana", "content": "x"}, *MESSAGES], "max_tokens": 2}
    assert httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60).status_code == 200


def test_a_failure_of_a_served_adapter_is_a_500_without_details(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AdapterNotFound("adapter path '/a/secret/path' is no directory")

    with monkeypatch.context() as patch:
        patch.setattr(server.llm.engine, "process_input", fail)
        error = refuse(server, {"messages": MESSAGES, "model": "audio"}, 500)
    assert "adapter" in error["message"] and "secret" not in error["message"] and error["code"] is None


def test_a_failed_step_reveals_no_details(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("a secret")

    with monkeypatch.context() as patch:
        patch.setattr(server.llm.engine.runner, "run", fail)
        error = refuse(server, {"messages": MESSAGES}, 500)
    assert error == {"message": "internal server error", "type": "internal_server_error", "param": None, "code": None}


def test_a_wrong_method_names_the_allowed_ones(server: RunningServer) -> None:
    response = httpx.get(f"{server.address}/v1/chat/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"


@pytest.mark.parametrize(("field", "value"), [("model", "gpt-9"), ("lora", "gpt-9"), ("lora", [{"name": "gpt-9"}])])
def test_an_unknown_name_is_404(server: RunningServer, field: str, value: object) -> None:
    error = refuse(server, {"messages": MESSAGES, field: value}, 404)
    assert (error["param"], error["type"]) == (field, "not_found_error")
    assert "'gpt-9'" in error["message"] and "'audio'" in error["message"]


def bad_media(case: str, wav: bytes, png: bytes) -> list[dict[str, Any]]:
    image = url_part("image_url", png, "image/png")
    return {
        "truncated PNG": [url_part("image_url", png[: len(png) // 2], "image/png")],
        "0-byte audio": [input_audio_part(b"")],
        "text as image": [url_part("image_url", b"just some words", "image/png")],
        "audio as image": [url_part("image_url", wav, "image/png")],
        "web address": [{"type": "image_url", "image_url": {"url": "ftp://example.com/cat.png"}}],
        "not base64": [{"type": "input_audio", "input_audio": {"data": "@@@@", "format": "wav"}}],
        "more placeholders than media": [text_part("<|image|> <|image|>"), image],
        "placeholder without media": [text_part("what is <|audio|>?")],
        "more images than allowed": [image, image],
    }[case]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("truncated PNG", "image"),
        ("0-byte audio", "0 bytes"),
        ("text as image", "neither audio nor an image"),
        ("audio as image", "audio, but image"),
        ("web address", "scheme 'ftp'"),
        ("not base64", "base64"),
        ("more placeholders than media", "3"),
        ("placeholder without media", "1"),
        ("more images than allowed", "limit_mm_per_prompt"),
    ],
)
def test_bad_media_is_refused_by_name(server: RunningServer, wav: bytes, png: bytes, case: str, text: str) -> None:
    error = refuse(server, message_of(*bad_media(case, wav, png)))
    assert error["code"] == "media_error"
    assert text in error["message"]


@pytest.mark.parametrize("is_claimed", [True, False], ids=["claimed", "sent in chunks"])
def test_a_body_of_3_gb_is_refused_before_it_is_in_memory(server: RunningServer, is_claimed: bool) -> None:
    """Send the claimed number of bytes, or chunk after chunk, until the server responds."""
    address = urlsplit(server.address)
    claim = b"content-length: 3221225472" if is_claimed else b"transfer-encoding: chunked"
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n%s\r\n\r\n" % claim
    )
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head)
        if not is_claimed:
            for _ in range(129):
                connection.sendall(chunk)
        response = b""
        while b"request_too_large" not in response:
            received = connection.recv(65536)
            assert received, response
            response += received
    assert response.startswith(b"HTTP/1.1 413 ")
    assert b"134217728 bytes" in response


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe"])
def test_a_body_that_is_not_json_is_refused(server: RunningServer, body: bytes) -> None:
    response = post_json(f"{server.address}/v1/chat/completions", body)
    assert response.status_code == 400
    assert "not JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v2/nothing", 404), ("PUT", "/v1/models", 405)])
def test_unknown_routes_have_openais_error_body(server: RunningServer, method: str, path: str, status: int) -> None:
    response = httpx.request(method, server.address + path)
    assert response.status_code == status
    assert path in response.json()["error"]["message"]


def test_health_is_503_for_a_dead_engine(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert httpx.get(f"{server.address}/health").status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(AsyncLLM, "is_alive", property(lambda self: False))
        assert httpx.get(f"{server.address}/health").status_code == 503


def test_an_internal_error_reveals_no_details(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    with monkeypatch.context() as patch:
        patch.setattr(server.llm.engine, "default_sampling_params", lambda **_: fail())
        response = httpx.post(f"{server.address}/v1/chat/completions", json={"messages": MESSAGES})
    assert response.status_code == 500
    assert "secret" not in response.text and json.loads(response.text)["error"]["type"] == "internal_server_error"


def test_all_routes_but_health_need_the_api_key(server: RunningServer) -> None:
    app = build_app(server.llm, load_served_models(server.llm), api_key="clé")
    with run_app(app) as address:
        assert httpx.get(f"{address}/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic clé".encode()}):
            refused = httpx.get(f"{address}/v1/models", headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        allowed = httpx.get(f"{address}/v1/models", headers={"authorization": "Bearer clé".encode()})
        assert allowed.status_code == 200


def test_a_scale_that_overflows_is_a_client_error(server: RunningServer) -> None:
    error = refuse(server, {"messages": MESSAGES, "lora": [{"name": "audio", "scale": 1e308}]})
    assert "too large" in error["message"]
