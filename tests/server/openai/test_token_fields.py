"""Token counts in each chunk of a stream, and ids of tokens."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mmlora.server.openai.completions import output as completions_output
from tests.server.conftest import RunningServer, ServerFactory, input_audio_part, still_serving, text_part

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
CONTINUOUS = {"include_usage": True, "continuous_usage_stats": True}
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


@pytest.fixture(scope="module")
def shared_server(start_server: ServerFactory) -> RunningServer:
    return start_server(max_logprobs=-1)


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    with still_serving(shared_server):
        yield shared_server


def ask(server: RunningServer, path: str, **fields: Any) -> dict[str, Any]:
    prompt = (
        {"messages": [{"role": "user", "content": "tell me"}]} if path == CHAT else {"prompt": ["one", "three two"]}
    )
    body = {**prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields}
    response = httpx.post(server.address + path, json=body, timeout=60)
    return {"status": response.status_code, **response.json()}


def stream(server: RunningServer, path: str, **fields: Any) -> list[dict[str, Any]]:
    prompt = (
        {"messages": [{"role": "user", "content": "tell me"}]} if path == CHAT else {"prompt": ["one", "three two"]}
    )
    body = {**prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "stream": True, **fields}
    with httpx.stream("POST", server.address + path, json=body, timeout=60) as response:
        assert response.status_code == 200, response.read()
        return events(response)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("fields", [{}, {"n": 3, "temperature": 1}, {"n": 2, "logprobs": True}], ids=str)
def test_each_chunk_of_a_chat_counts_the_tokens_of_its_choice(server: RunningServer, fields: dict[str, Any]) -> None:
    *chunks, last = stream(server, CHAT, stream_options=CONTINUOUS, **fields)
    n = fields.get("n", 1)
    prompt_tokens = ask(server, CHAT)["usage"]["prompt_tokens"]
    for index in range(n):
        counts = [chunk["usage"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        completion_tokens = [usage["completion_tokens"] for usage in counts]
        assert completion_tokens == sorted(completion_tokens) and completion_tokens[0] == 0
        assert completion_tokens[-1] == 6 and len(set(completion_tokens)) > 2
        assert {usage["prompt_tokens"] for usage in counts} == {prompt_tokens}
        assert all(usage["total_tokens"] == prompt_tokens + usage["completion_tokens"] for usage in counts)
    assert last["choices"] == [] and [last["usage"][name] for name in COUNTS] == [
        prompt_tokens,
        6 * n,
        prompt_tokens + 6 * n,
    ]


@pytest.mark.parametrize(
    "fields", [{}, {"echo": True}, {"echo": True, "logprobs": 2, "n": 2}, {"logprobs": 1}], ids=str
)
def test_each_chunk_of_a_completion_counts_its_own_prompt(server: RunningServer, fields: dict[str, Any]) -> None:
    *chunks, last = stream(server, COMPLETION, stream_options=CONTINUOUS, **fields)
    n = fields.get("n", 1)
    alone = [ask(server, COMPLETION, prompt=text)["usage"]["prompt_tokens"] for text in ("one", "three two")]
    assert alone[0] != alone[1]
    for index in range(2 * n):
        counts = [chunk["usage"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert {usage["prompt_tokens"] for usage in counts} == {alone[index // n]}
        assert (counts[0]["completion_tokens"], counts[-1]["completion_tokens"]) == (0, 6)
    assert [last["usage"][name] for name in COUNTS] == [sum(alone), 12 * n, sum(alone) + 12 * n]


def test_a_scored_prompt_counts_no_output(server: RunningServer) -> None:
    chunks = stream(server, COMPLETION, stream_options=CONTINUOUS, echo=True, max_tokens=0, logprobs=1)
    assert {chunk["usage"]["completion_tokens"] for chunk in chunks} == {0}


@pytest.mark.parametrize(
    ("options", "in_chunks", "at_the_end"),
    [
        (None, False, False),
        ({}, False, False),
        ({"include_usage": True}, False, True),
        ({"include_usage": True, "continuous_usage_stats": False}, False, True),
        ({"include_usage": None, "continuous_usage_stats": True}, True, True),
        ({"include_usage": False, "continuous_usage_stats": True}, False, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_where_a_stream_has_token_counts(
    server: RunningServer, path: str, options: Any, in_chunks: bool, at_the_end: bool
) -> None:
    chunks = stream(server, path, stream_options=options)
    assert any(chunk.get("usage") for chunk in chunks if chunk["choices"]) == in_chunks
    assert (chunks[-1]["choices"] == []) == at_the_end


def test_options_without_a_stream(server: RunningServer) -> None:
    assert ask(server, CHAT, stream_options={})["status"] == 200
    refused = ask(server, CHAT, stream_options={"continuous_usage_stats": True})
    assert (refused["status"], refused["error"]["param"]) == (400, "stream_options")


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_stream_has_the_ids_of_the_whole_response(server: RunningServer, path: str) -> None:
    whole = ask(server, path, return_token_ids=True, n=2, seed=3, temperature=1)
    chunks = stream(server, path, return_token_ids=True, n=2, seed=3, temperature=1)
    prompts = {}
    for choice in whole["choices"]:
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        ids = [chunk["choices"][0]["token_ids"] for chunk in own]
        assert sum(ids, []) == choice["token_ids"] and len(choice["token_ids"]) == 6
        first, *others = own
        holder = first if path == CHAT else first["choices"][0]
        prompts[choice["index"]] = holder["prompt_token_ids"]
        assert not any("prompt_token_ids" in {**chunk, **chunk["choices"][0]} for chunk in others)
        assert prompts[choice["index"]] == (whole if path == CHAT else choice)["prompt_token_ids"]
    tokenizer = server.llm.tokenizer
    if path == CHAT:
        body = {"messages": [{"role": "user", "content": "tell me"}]}
        assert prompts[0] == httpx.post(f"{server.address}/tokenize", json=body).json()["tokens"]
    else:
        assert [prompts[index] for index in range(4)] == [
            tokenizer(text).input_ids for text in ("one", "one", "three two", "three two")
        ]


def test_the_ids_decode_to_the_text_and_include_the_end(server: RunningServer) -> None:
    body = {"return_token_ids": True, "ignore_eos": False, "max_tokens": 200, "skip_special_tokens": False}
    choice = ask(server, COMPLETION, prompt="one", **body)["choices"][0]
    assert server.llm.tokenizer.decode(choice["token_ids"]).startswith(choice["text"])
    assert ask(server, COMPLETION, prompt=[choice["prompt_token_ids"]], **body)["choices"][0]["text"] == choice["text"]


def test_the_ids_of_media_are_placeholders(server: RunningServer, wav: bytes) -> None:
    messages = [{"role": "user", "content": [input_audio_part(wav), text_part("what?")]}]
    whole = ask(server, CHAT, messages=messages, return_token_ids=True)
    assert len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"] > 12


def test_ids_are_left_out_unless_requested(server: RunningServer) -> None:
    for path in (CHAT, COMPLETION):
        for fields in ({}, {"return_token_ids": False}, {"return_token_ids": None}):
            whole = ask(server, path, **fields)
            assert "token_ids" not in whole["choices"][0] and "prompt_token_ids" not in str(whole)
            assert "token_ids" not in str(stream(server, path, **fields))


def test_too_many_repeated_ids_are_refused(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    num_ids = ask(server, COMPLETION, prompt="three two")["usage"]["prompt_tokens"]
    monkeypatch.setattr(completions_output, "MAX_PROMPT_IDS", num_ids)
    assert ask(server, COMPLETION, prompt="three two", return_token_ids=True)["status"] == 200
    refused = ask(server, COMPLETION, prompt="three two", return_token_ids=True, n=2)
    assert (refused["status"], refused["error"]["param"]) == (400, "n")
    assert ask(server, COMPLETION, prompt="three two", n=2)["status"] == 200


def test_log_probabilities_of_the_prompt_are_null_unless_requested(server: RunningServer) -> None:
    assert ask(server, CHAT)["prompt_logprobs"] is None
    assert [choice["prompt_logprobs"] for choice in ask(server, COMPLETION)["choices"]] == [None, None]
    assert ask(server, CHAT, prompt_logprobs=0)["prompt_logprobs"][1].keys()


@pytest.mark.parametrize("max_logprobs", [-1, None])
def test_minus_one_is_the_vocabulary(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, max_logprobs: int | None
) -> None:
    vocab_size = server.llm.vocab_size
    args = dataclasses.replace(server.llm.args, max_logprobs=max_logprobs or vocab_size)
    monkeypatch.setattr(server.llm.input_processor, "_args", args)
    (choice,) = ask(server, CHAT, logprobs=True, top_logprobs=-1, max_tokens=2)["choices"]
    assert [len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]] == [vocab_size] * 2
    probability = sum(math.exp(entry["logprob"]) for entry in choice["logprobs"]["content"][0]["top_logprobs"])
    assert probability == pytest.approx(1, abs=1e-3)
    listed = ask(server, CHAT, prompt_logprobs=-1)["prompt_logprobs"]
    assert {len(entry) for entry in listed[1:]} == {vocab_size}
    include = {"include": ["message.output_text.logprobs"], "top_logprobs": -1, "input": "hi", "max_output_tokens": 2}
    response = httpx.post(f"{server.address}/v1/responses", json=include, timeout=60).json()
    part = response["output"][0]["content"][0]
    assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {vocab_size}
    scored = ask(server, COMPLETION, logprobs=-1, max_tokens=1, prompt="one")["choices"][0]["logprobs"]
    assert len(scored["tokens"]) == 1 and len(scored["top_logprobs"][0]) > vocab_size / 2


@pytest.mark.parametrize("field", ["top_logprobs", "prompt_logprobs"])
def test_the_vocabulary_may_exceed_the_limit(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    vocab_size = server.llm.vocab_size
    monkeypatch.setattr(
        server.llm.input_processor, "_args", dataclasses.replace(server.llm.args, max_logprobs=vocab_size - 1)
    )
    refused = ask(server, CHAT, logprobs=True, **{field: -1})
    assert (refused["status"], refused["error"]["param"]) == (400, field)
    assert f"all {vocab_size} tokens" in refused["error"]["message"]
    assert ask(server, CHAT, logprobs=True, **{field: vocab_size - 1})["status"] == 200
