"""Errors that clients recognize: the code of a prompt that is too long, and the field of a value out of range."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import RunningServer, ServerFactory, input_audio_part, still_serving, text_part

CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "x"}]},
    COMPLETION: {"prompt": "x"},
    RESPONSE: {"input": "x"},
}
LONG = "long " * 300
LOGPROBS = {"include": ["message.output_text.logprobs"]}


@pytest.fixture(scope="module")
def shared_server(start_server: ServerFactory) -> RunningServer:
    return start_server(max_logprobs=5)


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    with still_serving(shared_server):
        yield shared_server


def refuse(server: RunningServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(server.address + path, json=body, timeout=60)
    assert response.status_code == 400, response.text
    return dict(response.json()["error"])


def check_too_long(error: dict[str, Any], param: str) -> None:
    """Check an error as clients do: LiteLLM and LangChain by its words, others by its code."""
    assert (error["code"], error["param"], error["type"]) == ("context_length_exceeded", param, "invalid_request_error")
    assert "the prompt is too long" in error["message"]
    assert "this model's maximum context length is 512 tokens" in error["message"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": LONG * 1000}]}, "messages"),
        (COMPLETION, {"prompt": LONG}, "prompt"),
        (COMPLETION, {"prompt": LONG * 1000}, "prompt"),
        (COMPLETION, {"prompt": [100] * 512}, "prompt"),
        (COMPLETION, {"prompt": ["x", LONG]}, "prompt"),
        (RESPONSE, {"input": LONG}, "input"),
        (RESPONSE, {"input": "x", "instructions": LONG}, "input"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_prompt_that_is_too_long(
    server: RunningServer, path: str, body: dict[str, Any], param: str, is_stream: bool
) -> None:
    check_too_long(refuse(server, path, {**body, "stream": is_stream}), param)


def test_tokens_of_media_count(server: RunningServer, wav: bytes) -> None:
    filler = {"role": "user", "content": [input_audio_part(wav), text_part("x" * 500)]}
    check_too_long(refuse(server, CHAT, {"messages": [filler]}), "messages")
    only_text = {"messages": [{"role": "user", "content": "x" * 500}], "max_tokens": 1}
    assert httpx.post(server.address + CHAT, json=only_text, timeout=60).status_code == 200


def test_a_transcription_with_a_long_context(server: RunningServer, wav: bytes) -> None:
    answer = httpx.post(f"{server.address}/v1/audio/transcriptions", data={"prompt": LONG}, files={"file": wav})
    assert answer.status_code == 400
    check_too_long(answer.json()["error"], "file")


def test_tokenizing_a_text_that_cannot_fit(server: RunningServer) -> None:
    check_too_long(refuse(server, "/tokenize", {"prompt": LONG * 1000}), "prompt")
    messages = [{"role": "user", "content": LONG * 1000}]
    check_too_long(refuse(server, "/tokenize", {"messages": messages}), "messages")


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.5),
        ("seed", 2**80),
        ("min_tokens", -1),
        ("priority", 1),
        ("priority", 2**63),
        ("cache_salt", ""),
        ("cache_salt", "x" * 1025),
        ("logit_bias", {"99999": 1}),
        ("stop_token_ids", [3, 99999]),
        ("stop", ["", "a"]),
    ],
)
def test_a_value_out_of_range_is_named(server: RunningServer, path: str, field: str, value: Any) -> None:
    error = refuse(server, path, {**PROMPTS[path], field: value})
    assert error["param"] == field and field in error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": -3}, "top_logprobs"),
        (CHAT, {"prompt_logprobs": 6}, "prompt_logprobs"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"max_tokens": -7}, "max_tokens"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (COMPLETION, {"logprobs": 6}, "logprobs"),
        (COMPLETION, {"prompt": [99999]}, "prompt"),
        (COMPLETION, {"prompt": ""}, "prompt"),
        (RESPONSE, {**LOGPROBS, "top_logprobs": 6}, "top_logprobs"),
        (RESPONSE, {"max_output_tokens": 0}, "max_output_tokens"),
    ],
    ids=json.dumps,
)
def test_the_client_s_name_of_a_field_is_used(
    server: RunningServer, path: str, fields: dict[str, Any], param: str
) -> None:
    error = refuse(server, path, {**PROMPTS[path], **fields})
    assert error["param"] == param
    if param not in ("prompt", "continue_final_message"):
        assert error["message"].startswith(param)
