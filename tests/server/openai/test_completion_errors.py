"""Bad completion requests: each gets an error that names the problem, and the server keeps serving."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from openai import APIError

from mmlora.errors import AdapterNotFound, EngineDeadError, MediaError, MMLoRAError, RequestError
from mmlora.outputs import RequestOutput
from mmlora.processors.media.loader import parse_references
from mmlora.sampling_params import SamplingParams
from mmlora.server.openai.completions.protocol import MAX_PROMPTS, CompletionRequest
from mmlora.server.openai.generation import merge
from tests.server.conftest import (
    RunningServer,
    ServerFactory,
    leave_before_answer,
    post_json,
    still_serving,
    wait_until_idle,
)

LONG = {"max_tokens": 480, "ignore_eos": True}


@pytest.fixture(scope="module")
def shared_server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    return start_server(
        default_mm_loras={"audio": adapters["speech"]}, limit_mm_per_prompt={"image": 1}, max_logprobs=5
    )


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    with still_serving(shared_server):
        yield shared_server


def post(server: RunningServer, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.address}/v1/completions", json=body, timeout=60)


def refuse(server: RunningServer, status: int = 400, **body: Any) -> dict[str, Any]:
    response = post(server, **body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def url(data: bytes) -> str:
    return f"data:;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({}, "prompt", "required"),
        ({"prompt": None}, "prompt", "null"),
        ({"prompt": []}, "prompt", "not empty"),
        ({"prompt": {"text": "a"}}, "prompt", "a list of token ids"),
        ({"prompt": ["a", 1]}, "prompt", "prompt[1] is 1"),
        ({"prompt": ["a", [1]]}, "prompt", "prompt[1]"),
        ({"prompt": [1, True]}, "prompt", "prompt[0] is 1"),
        ({"prompt": [[1], [2.5]]}, "prompt", "prompt[1]"),
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt", "257 prompts; the limit is 256"),
        ({"prompt": ["a"] * 200, "n": 6}, "n", "the limit is 5"),
        ({"prompt": "a", "n": 2, "best_of": 3}, "best_of", "best_of=3"),
        ({"prompt": "a", "best_of": 2}, "best_of", "which is 1"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix"),
        ({"prompt": "a", "messages": [1]}, "messages", "unknown field"),
        ({"prompt": "a", "x" * 10**6: "y" * 10**6}, "x" * 80, "unknown field"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "integer"),
        ({"prompt": "a", "echo": "yes"}, "echo", "boolean"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"prompt": "a", "stream": True, "stream_options": []}, "stream_options", "an object"),
        ({"prompt": "a", "stop_token_ids": 5}, "stop_token_ids", "a valid array"),
        ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "stream=false"),
        ({"prompt": ["a", "b"], "multi_modal_data": {"audio": "data:,"}}, "multi_modal_data", "prompt has 2"),
        ({"prompt": "a", "multi_modal_data": ["data:,"]}, "multi_modal_data", "an object"),
        ({"prompt": "a", "lora": [{"name": "audio", "scale": "much"}]}, "lora", "much"),
    ],
    ids=lambda value: str(value)[:24] if not isinstance(value, dict) else "",
)
def test_an_unsupported_field_is_named(server: RunningServer, body: Any, param: str, text: str) -> None:
    error = refuse(server, **body)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert text in error["message"] and len(error["message"]) < 400


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"n": 0}, "n=0"),
        ({"n": 129}, "n=129"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": -1, "echo": True}, "max_tokens=-1"),
        ({"logprobs": 6}, "max_logprobs=5"),
        ({"logprobs": -1, "echo": True}, "max_logprobs=5"),
        ({"prompt_logprobs": 6}, "max_logprobs=5"),
        ({"stop_token_ids": [10**6]}, "outside the vocabulary"),
        ({"prompt": "long " * 300}, "max_model_len=512"),
        ({"prompt": "long " * 300, "add_special_tokens": False}, "max_model_len=512"),
        ({"prompt": "x" * 200_000, "add_special_tokens": False}, "200000 characters"),
        ({"prompt": [10**6]}, "outside the vocabulary"),
        ({"prompt": [10**40]}, "outside the vocabulary"),
        ({"prompt": [[]]}, "the prompt is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_out_of_range_are_named(server: RunningServer, body: dict[str, Any], text: str) -> None:
    error = refuse(server, **{"prompt": "a", **body})
    assert text in error["message"]


def test_a_lone_surrogate_is_refused(server: RunningServer) -> None:
    response = post_json(f"{server.address}/v1/completions", b'{"prompt": "\\ud800"}')
    assert response.status_code == 400, response.text


def test_harmless_fields_are_accepted(server: RunningServer) -> None:
    harmless = {"user": "me", "suffix": None, "best_of": 2, "n": 2, "metadata": {}, "echo": None, "seed": None}
    assert post(server, prompt="a", max_tokens=2, add_special_tokens=True, **harmless).status_code == 200


@pytest.mark.parametrize(("field", "value"), [("model", "gpt-9"), ("lora", "gpt-9"), ("lora", [{"name": "gpt-9"}])])
def test_an_unknown_name_is_404(server: RunningServer, field: str, value: object) -> None:
    error = refuse(server, 404, prompt=["a", "b"], **{field: value})
    assert (error["param"], error["type"]) == (field, "not_found_error")


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("truncated", "image"),
        ("empty", "0 bytes"),
        ("audio as image", "audio, but image"),
        ("web address", "scheme 'ftp'"),
        ("path", "allowed are data:, http:, https: and file: URLs"),
        ("no text", "must be a string"),
        ("too many", "limit_mm_per_prompt"),
        ("too many, none of them readable", "limit_mm_per_prompt"),
        ("no placeholder", "placeholder"),
        ("no media", "placeholder"),
        ("video", "videos are not supported"),
        ("unknown modality", "the model takes audio, image"),
    ],
)
def test_bad_media_is_refused_by_name(server: RunningServer, wav: bytes, png: bytes, case: str, text: str) -> None:
    data: dict[str, Any] = {
        "truncated": {"image": url(png[: len(png) // 2])},
        "empty": {"image": "data:;base64,"},
        "audio as image": {"image": url(wav)},
        "web address": {"image": "ftp://example.com/cat.png"},
        "path": {"image": "/etc/passwd"},
        "no text": {"image": [{"url": url(png)}]},
        "too many": {"image": [url(png)] * 2},
        "too many, none of them readable": {"image": ["?"] * 2},
        "no placeholder": {"image": url(png)},
        "no media": {"image": None},
        "video": {"video": "data:,"},
        "unknown modality": {"x" * 10**6: "data:,"},
    }[case]
    error = refuse(server, prompt="a" if case == "no placeholder" else "<|image|>", multi_modal_data=data)
    assert error["code"] == "media_error"
    assert text in error["message"] and len(error["message"]) < 400


def test_a_text_model_refuses_media() -> None:
    with pytest.raises(MediaError, match="text only"):
        parse_references({"image": "data:,"}, {}, ())


@pytest.mark.parametrize("stream", [False, True])
def test_the_invalid_prompt_is_named_and_no_prompt_is_started(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    added: list[object] = []
    monkeypatch.setattr(server.llm.engine, "add_input", added.append)
    error = refuse(server, prompt=["a", "b", "long " * 300], stream=stream)
    assert error["message"].startswith("prompt[2]: ") and "max_model_len=512" in error["message"]
    assert error["code"] == "context_length_exceeded" and not added


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", [RequestError("no token can be chosen"), MMLoRAError("a secret")])
def test_a_prompt_that_fails_before_the_stream_begins_fails_them_all(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, stream: bool, failure: MMLoRAError
) -> None:
    with monkeypatch.context() as patch:
        fail_at(server, patch, 1, failure, of_index=2)
        error = refuse(server, 400 if isinstance(failure, RequestError) else 500, prompt=["a", "b", "c"], stream=stream)
    reason = "no token can be chosen" if isinstance(failure, RequestError) else "internal server error"
    assert error["message"] == f"prompt[2]: {reason}"
    wait_until_idle(server)


def fail_at(
    server: RunningServer, patch: pytest.MonkeyPatch, step: int, failure: MMLoRAError, *, of_index: int
) -> None:
    """Make the sequence of one prompt fail from a step on; in the first step the other prompts get no token."""
    sampler, calls = server.llm.engine.sampler, []
    run = sampler.run

    def run_and_fail(items: Any, logits: Any, result: Any) -> None:
        run(items, logits, result)
        calls.append(items)
        ids = {item.seq: item.seq.request.request_id for item in items}
        failed = [seq for seq, name in ids.items() if name.endswith(f"-{of_index}") and len(calls) >= step]
        result.failed.extend((seq, failure) for seq in failed)
        if step == 1:
            result.sampled.clear()

    patch.setattr(sampler, "run", run_and_fail)


def test_a_prompt_that_fails_in_the_middle_ends_the_stream(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, aborted: list[RequestOutput]
) -> None:
    with monkeypatch.context() as patch:
        fail_at(server, patch, 5, MMLoRAError("a secret"), of_index=1)
        with server.client as client, pytest.raises(APIError, match=r"prompt\[1\]: internal server error"):
            for chunk in client.completions.create(
                model="tiny", prompt=["a", "b", "c"], stream=True, max_tokens=480, extra_body={"ignore_eos": True}
            ):
                assert chunk.choices
        wait_until_idle(server)
    assert len(aborted) == 2  # the other prompts are aborted


def test_after_the_error_event_a_stream_is_done(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_at(server, patch, 3, RequestError("no"), of_index=0)
        lines = [line for line in post(server, prompt="a", stream=True, **LONG).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["message"] == "no"


def test_the_error_of_a_dead_engine_names_no_prompt(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise EngineDeadError("the engine has stopped")

    with monkeypatch.context() as patch:
        patch.setattr(server.llm.engine, "process_input", fail)
        assert refuse(server, 503, prompt=["a", "b"])["message"] == "the engine has stopped"


def test_a_broken_adapter_is_a_server_error(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AdapterNotFound("adapter path '/a/secret/path' is no directory")

    with monkeypatch.context() as patch:
        patch.setattr(server.llm.engine, "process_input", fail)
        error = refuse(server, 500, prompt=["a", "b"], model="audio")
    assert "adapter" in error["message"] and "secret" not in error["message"] and error["code"] is None


def test_a_client_that_disconnects_from_a_stream_aborts_all_its_prompts(
    server: RunningServer, aborted: list[RequestOutput]
) -> None:
    with server.client as client:
        response = client.completions.create(
            model="tiny", prompt=["a", "b", "c"], n=2, stream=True, max_tokens=480, extra_body={"ignore_eos": True}
        )
        next(iter(response))
        response.close()
    wait_until_idle(server)
    assert [{c.finish_reason for c in output.outputs} for output in aborted] == [{"abort"}] * 3


def test_a_client_that_disconnects_before_the_response_aborts_all_its_prompts(
    server: RunningServer, aborted: list[RequestOutput]
) -> None:
    leave_before_answer(server, "/v1/completions", {"prompt": ["a", "b"], **LONG})
    assert [output.outputs[0].finish_reason for output in aborted] == ["abort"] * 2


def test_a_wrong_method_names_the_allowed_ones(server: RunningServer) -> None:
    response = httpx.get(f"{server.address}/v1/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"


def test_merge_closes_every_source() -> None:
    """Leaving early or one failure ends all sources; items that arrived before are kept."""
    closed: list[str] = []

    async def count(name: str, end: int, failure: Exception | None = None) -> AsyncIterator[str]:
        try:
            for number in range(end):
                await asyncio.sleep(0)
                yield f"{name}{number}"
            if failure:
                raise failure
        finally:
            closed.append(name)

    async def run() -> None:
        assert sorted([item async for item in merge([count("a", 2), count("b", 1)])]) == ["a0", "a1", "b0"]
        assert sorted(closed) == ["a", "b"]
        closed.clear()
        merged = merge([count("a", 10**9), count("b", 10**9)])
        await anext(merged)
        await merged.aclose()
        assert sorted(closed) == ["a", "b"]
        closed.clear()
        got = []
        with pytest.raises(RequestError, match="broken"):
            async for item in merge([count("a", 10**9), count("b", 1, RequestError("broken"))]):
                got.append(item)
        assert "b0" in got and sorted(closed) == ["a", "b"]

    asyncio.run(run())


def test_the_larger_number_of_prompt_logprobs_is_requested() -> None:
    for fields, expected in (
        ({"logprobs": 3}, None),
        ({"logprobs": 3, "echo": True}, 3),
        ({"logprobs": 3, "echo": True, "prompt_logprobs": 5}, 5),
        ({"logprobs": -1, "echo": True, "prompt_logprobs": 5}, -1),
    ):
        options = CompletionRequest(prompt="a", **fields).sampling_options()
        assert SamplingParams(**options).prompt_logprobs == expected


@pytest.mark.parametrize(
    "extra", [{"prompt_logprobs": 5}, {"echo": True, "logprobs": 5}], ids=["prompt_logprobs", "echo"]
)
def test_log_probabilities_of_a_prompt_are_bounded_over_all_choices(
    server: RunningServer, extra: dict[str, Any]
) -> None:
    body = {"prompt": ["ab" * 200] * 4, "n": 128, "max_tokens": 1, **extra}
    response = httpx.post(f"{server.address}/v1/completions", json=body, timeout=60)
    assert response.status_code == 400 and "log probabilities of prompt tokens" in response.json()["error"]["message"]
    fewer = httpx.post(f"{server.address}/v1/completions", json={**body, "n": 2}, timeout=60)
    assert fewer.status_code == 200 and len(fewer.json()["choices"]) == 8
