"""Isolation: valid requests keep their outputs while all kinds of invalid ones are sent to every endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server.conftest import (
    JSON,
    RunningServer,
    ServerFactory,
    input_audio_part,
    text_part,
    url_part,
    wait_until_idle,
)

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/load_lora_adapter")


@pytest.fixture(scope="module")
def server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    return start_server(default_mm_loras={"audio": adapters["speech"], "image": adapters["vision"]})


def good_bodies(wav: bytes, png: bytes) -> list[tuple[str, dict[str, Any]]]:
    parts = [
        [text_part("tell me a story")],
        [input_audio_part(wav), text_part("what is said?")],
        [url_part("image_url", png, "image/png"), text_part("what is this?")],
    ]
    chats = [("/v1/chat/completions", {"messages": [{"role": "user", "content": part}], **GREEDY}) for part in parts]
    return [*chats, ("/v1/completions", {"prompt": ["one", "two"], **GREEDY}), ("/tokenize", {"prompt": "some words"})]


def bad_contents(wav: bytes, png: bytes) -> list[bytes]:
    """Bodies that no endpoint can serve."""
    message = {"role": "user", "content": "hello"}
    media = [input_audio_part(wav[:50]), input_audio_part(b""), url_part("image_url", png[:99], "image/png")]
    fields: list[Any] = [
        {},
        [],
        7,
        {"messages": 1, "prompt": 1, "tokens": 1},
        {"messages": [message], "prompt": {}, "tokens": [10**30], "max_tokens": -1},
        {"messages": [message], "prompt": "x", "model": "no such model", "tokens": [1]},
        {"messages": [message], "prompt": "x", "unknown": 1, "tokens": [1]},
        {"messages": [message], "prompt": [], "temperature": 1e400, "tokens": "x"},
        {"messages": [message], "prompt": [1e9], "logit_bias": {"x": 1}, "tokens": [-1]},
        {"messages": [{"role": "user", "content": "long " * 4000}], "prompt": None, "max_tokens": 4},
        {"messages": [message], "lora": [{"name": "audio", "scale": 1e300}], "tokens": None},
        *({"messages": [{"role": "user", "content": [part]}]} for part in media),
        {"prompt": "<|audio|>", "multi_modal_data": {"audio": "data:audio/wav;base64,AAAA"}},
    ]
    raw = [b"", b"{", b"\xff" * 100, b"[" * 100_000, b'{"a":' * 10_000, b"null", b'{"messages": NaN}', b"0" * 10_000]
    return [*(json.dumps(entry).encode() for entry in fields), *raw]


def stable_part(answer: httpx.Response) -> Any:
    """Return the part of a response that must be the same each time."""
    content = answer.json()
    return content.get("choices", content), content.get("usage", {}).get("completion_tokens"), content.get("lora")


def test_valid_requests_are_unaffected_by_invalid_ones(server: RunningServer, wav: bytes, png: bytes) -> None:
    good = good_bodies(wav, png)
    expected = [stable_part(httpx.post(server.address + path, json=body, timeout=60)) for path, body in good]
    bad = [(path, content) for path in ENDPOINTS for content in bad_contents(wav, png)]
    random.Random(0).shuffle(bad)
    statuses: list[tuple[str, bytes, int]] = []

    async def send_bad(client: httpx.AsyncClient) -> None:
        while bad:
            path, content = bad.pop()
            answer = await client.post(server.address + path, content=content, headers=JSON)
            statuses.append((path, content[:80], answer.status_code))

    async def leave(client: httpx.AsyncClient) -> None:
        """Request long outputs and disconnect before they end."""
        body = {**good[0][1], "max_tokens": 400, "stream": True}
        while bad:
            async with client.stream("POST", f"{server.address}/v1/chat/completions", json=body) as response:
                with contextlib.suppress(StopAsyncIteration):
                    await anext(response.aiter_lines())

    async def send_good(client: httpx.AsyncClient) -> int:
        num_right = 0
        while bad or not num_right:
            for (path, body), answer in zip(good, expected, strict=True):
                received = await client.post(server.address + path, json=body)
                assert received.status_code == 200 and stable_part(received) == answer, received.text
                num_right += 1
        return num_right

    async def run() -> int:
        async with httpx.AsyncClient(timeout=120) as client:
            senders: list[Callable[[httpx.AsyncClient], Any]] = [send_good, send_good, send_bad, send_bad, leave]
            results = await asyncio.gather(*(sender(client) for sender in senders))
        return int(results[0] + results[1])

    assert asyncio.run(run()) >= 2 * len(good)
    wrong = [entry for entry in statuses if not 400 <= entry[2] < 500]
    assert not wrong and len(statuses) == len(ENDPOINTS) * len(bad_contents(wav, png))
    wait_until_idle(server)
