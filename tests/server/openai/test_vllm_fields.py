"""Fields of vLLM's API that OpenAI's does not have, in chat completions and completions."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import httpx
import pytest

from mmlora.server.openai import logprobs as prompt_logprobs
from tests.server.conftest import RunningServer, ServerFactory, input_audio_part, text_part, url_part, wait_until_idle

STORY = "Once upon a time there was a tiny model that lived in a test, and it was happy there"
DRAFT = [{"role": "user", "content": "Begin"}, {"role": "assistant", "content": "Well, I"}]


@pytest.fixture(scope="module")
def server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    options = {"scheduling_policy": "priority", "max_num_seqs": 1, "block_size": 4, "max_logprobs": -1}
    return start_server(default_mm_loras={"audio": adapters["speech"]}, **options)


@pytest.fixture(scope="module")
def fcfs(start_server: ServerFactory) -> RunningServer:
    return start_server()


def post(server: RunningServer, route: str, **fields: Any) -> dict[str, Any]:
    body = {"max_tokens": 4, "temperature": 0, **fields}
    response = httpx.post(f"{server.address}{route}", json=body, timeout=120)
    return {"status": response.status_code, **response.json()}


def chat(server: RunningServer, messages: Any, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return post(server, "/v1/chat/completions", messages=messages, **fields)


def complete(server: RunningServer, prompt: Any, **fields: Any) -> dict[str, Any]:
    return post(server, "/v1/completions", prompt=prompt, **fields)


def num_cached(response: dict[str, Any]) -> int:
    return int(response["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("ask", [chat, complete])
def test_prefixes_are_shared_only_among_requests_with_the_same_salt(server: RunningServer, ask: Any) -> None:
    text = f"{STORY} ({ask.__name__})"
    found = [num_cached(ask(server, text, cache_salt=salt)) for salt in ("a", "a", "b", None, None, "b", "a", "None")]
    whole = found[1]
    assert found == [0, whole, 0, 0, whole, whole, whole, 0] and whole > 8
    refused = ask(server, text, cache_salt="")
    assert (refused["status"], "cache_salt=''" in refused["error"]["message"]) == (400, True)


def test_encoded_media_are_shared_only_among_requests_with_the_same_salt(server: RunningServer, png: bytes) -> None:
    encoder = server.llm.engine.runner.encoder
    assert encoder is not None
    before, counts = encoder.num_encoded, []
    for salt in ("a", "a", "b", None):
        message = [{"role": "user", "content": [url_part("image_url", png, "image/png"), text_part(str(len(counts)))]}]
        chat(server, message, cache_salt=salt, lora=[])
        counts.append(encoder.num_encoded - before)
    assert counts == [1, 1, 2, 3]


def test_usage_counts_cached_tokens_once_for_all_choices_and_media_separately(
    server: RunningServer, wav: bytes, png: bytes
) -> None:
    message = [
        {
            "role": "user",
            "content": [input_audio_part(wav), url_part("image_url", png, "image/png"), text_part(STORY)],
        }
    ]
    first, again = (chat(server, message, n=3, temperature=1)["usage"] for _ in range(2))
    details = again["prompt_tokens_details"]
    assert details["audio_tokens"] > 0 and details["image_tokens"] > 0
    kinds = ("audio_tokens", "image_tokens", "text_tokens")
    assert sum(details[kind] for kind in kinds) == again["prompt_tokens"] == first["prompt_tokens"]
    text_only = chat(server, STORY)["usage"]
    assert text_only["prompt_tokens_details"]["text_tokens"] == text_only["prompt_tokens"]
    assert first["prompt_tokens_details"]["cached_tokens"] < details["cached_tokens"] < again["prompt_tokens"]


def test_the_highest_priority_runs_first(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, runner = server.llm.engine.scheduler, server.llm.engine.runner
    run, is_over = runner.run, threading.Event()

    def run_slowly(scheduled: Any) -> Any:
        time.sleep(0 if is_over.is_set() else 0.02)
        return run(scheduled)

    monkeypatch.setattr(runner, "run", run_slowly)

    async def ask() -> list[str]:
        ended: list[str] = []
        async with httpx.AsyncClient(base_url=server.address, timeout=120) as client:

            async def one(name: str, route: str, priority: int | None, num_tokens: int) -> None:
                prompt = (
                    {"prompt": name} if route == "completions" else {"messages": [{"role": "user", "content": name}]}
                )
                body = {**prompt, "max_tokens": num_tokens, "ignore_eos": True, "priority": priority}
                (await client.post(f"/v1/{route}", json=body)).raise_for_status()
                ended.append(name)

            running = asyncio.create_task(one("running", "completions", 9, 480))
            while not scheduler.running:
                await asyncio.sleep(0.005)
            jobs = [
                ("late", "completions", 5),
                ("default", "chat/completions", None),
                ("early", "chat/completions", -1),
            ]
            tasks = [asyncio.create_task(one(name, route, priority, 2)) for name, route, priority in jobs]
            while len(scheduler.waiting) < 3 and not running.done():
                await asyncio.sleep(0.005)
            assert not running.done(), "the first request ended before the others were queued"
            is_over.set()
            await asyncio.gather(running, *tasks)
        return ended

    assert asyncio.run(ask()) == ["running", "early", "default", "late"]
    wait_until_idle(server)


@pytest.mark.parametrize("ask", [chat, complete])
def test_a_priority_needs_the_policy(fcfs: RunningServer, ask: Any) -> None:
    assert ask(fcfs, "x", priority=0)["status"] == 200
    for priority in (1, -1, 2**70):
        refused = ask(fcfs, "x", priority=priority)
        assert refused["status"] == 400 and "priority=" in refused["error"]["message"]
    assert "scheduling_policy='priority'" in ask(fcfs, "x", priority=3)["error"]["message"]


def test_a_message_is_continued_and_repeated(server: RunningServer) -> None:
    continued = chat(server, DRAFT, continue_final_message=True)
    text, usage = continued["choices"][0]["message"]["content"], continued["usage"]
    tokenizer = server.llm.tokenizer
    rendered = tokenizer.apply_chat_template(DRAFT, continue_final_message=True, tokenize=False)
    assert rendered.endswith("Well, I")
    expected = complete(server, rendered, add_special_tokens=False)
    assert (text, usage["prompt_tokens"]) == (expected["choices"][0]["text"], expected["usage"]["prompt_tokens"])
    begun = chat(server, DRAFT, add_generation_prompt=True)["usage"]["prompt_tokens"]
    bare = chat(server, DRAFT, add_generation_prompt=False)["usage"]["prompt_tokens"]
    assert usage["prompt_tokens"] < bare < begun
    echoed = chat(server, DRAFT, continue_final_message=True, add_generation_prompt=False, echo=True, n=2)
    assert [choice["message"]["content"] for choice in echoed["choices"]] == [f"Well, I{text}"] * 2
    assert echoed["usage"]["completion_tokens"] == 2 * usage["completion_tokens"]
    assert chat(server, "x", echo=True)["choices"] == chat(server, "x")["choices"], "the user's words are not repeated"


def test_the_tokens_of_a_continued_message(server: RunningServer) -> None:
    body = {"messages": DRAFT, "continue_final_message": True}
    tokenized = httpx.post(f"{server.address}/tokenize", json=body).raise_for_status().json()
    assert tokenized["count"] == chat(server, DRAFT, continue_final_message=True)["usage"]["prompt_tokens"]
    refused = httpx.post(f"{server.address}/tokenize", json={"prompt": "x", "continue_final_message": True})
    assert refused.status_code == 400 and "continue_final_message needs messages" in refused.text


def test_a_stream_repeats_the_message_first(server: RunningServer) -> None:
    parts: Any = [*DRAFT[:1], {"role": "assistant", "content": [text_part("Well"), text_part(", I")]}]
    extra = {"echo": True, "continue_final_message": True}
    with server.client as client:
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=parts, stream=True, temperature=0, max_tokens=4, extra_body=extra
            )
        )
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert deltas[0] == "Well, I"
    assert "".join(deltas) == chat(server, parts, **extra)["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("messages", "fields", "named"),
    [
        (DRAFT, {"continue_final_message": True, "add_generation_prompt": True}, "are mutually exclusive"),
        ("x", {"prompt_logprobs": 1, "stream": True}, "needs stream=false"),
        ("x", {"prompt_logprobs": -2}, "prompt_logprobs=-2"),
        ([*DRAFT[:1], {"role": "assistant", "content": [{"type": "text"}]}], {"echo": True}, "lacks its 'text' field"),
    ],
)
def test_invalid_combinations_are_refused(server: RunningServer, messages: Any, fields: Any, named: str) -> None:
    refused = chat(server, messages, **fields)
    assert refused["status"] == 400 and named in refused["error"]["message"]


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize(
    ("kind", "value"), [("json", {}), ("regex", "a"), ("choice", ["a"]), ("grammar", 'start: "a"')]
)
def test_replaced_fields_are_refused_with_their_replacement(
    server: RunningServer, ask: Any, kind: str, value: Any
) -> None:
    refused = ask(server, "x", **{f"guided_{kind}": value})
    assert (refused["status"], refused["error"]["param"]) == (400, f"guided_{kind}")
    assert f'use structured_outputs={{"{kind}": …}}' in refused["error"]["message"]
    assert ask(server, "x", **{f"guided_{kind}": None})["status"] == 200


def test_the_log_probabilities_of_a_prompt(server: RunningServer) -> None:
    response = chat(server, STORY, prompt_logprobs=2)
    listed = response["prompt_logprobs"]
    ids = httpx.post(f"{server.address}/tokenize", json={"messages": [{"role": "user", "content": STORY}]}).json()[
        "tokens"
    ]
    assert len(listed) == len(ids) and listed[0] is None
    expected = complete(server, ids, prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    for entry, same, token_id in zip(listed[1:], expected[1:], ids[1:], strict=True):
        assert entry.keys() == same.keys() and str(token_id) in entry and len(entry) in (2, 3)
        assert entry[str(token_id)] == {**same[str(token_id)], "logprob": pytest.approx(same[str(token_id)]["logprob"])}
    assert num_cached(response) == 0
    assert chat(server, STORY)["prompt_logprobs"] is None


def test_too_many_log_probabilities_of_a_prompt_are_refused(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_entries = chat(server, STORY)["usage"]["prompt_tokens"] * (1 + len(server.llm.tokenizer))
    monkeypatch.setattr(prompt_logprobs, "MAX_PROMPT_LOGPROBS", num_entries)
    assert chat(server, STORY, prompt_logprobs=-1, n=2)["status"] == 200, "the response has them once"
    monkeypatch.setattr(prompt_logprobs, "MAX_PROMPT_LOGPROBS", num_entries - 1)
    refused = chat(server, STORY, prompt_logprobs=-1)
    assert (refused["status"], refused["error"]["param"]) == (400, "prompt_logprobs")
