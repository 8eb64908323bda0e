"""Chat completions with the `openai` client: fields, streaming, and clients that disconnect."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from openai import APIError
from openai.types.chat import ChatCompletionChunk

from mmlora.errors import MMLoRAError
from mmlora.outputs import RequestOutput
from tests.server.conftest import (
    RunningServer,
    ServerFactory,
    input_audio_part,
    leave_before_answer,
    text_part,
    wait_until_idle,
)

LONG = {"max_tokens": 480, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    return start_server(default_mm_loras={"audio": adapters["speech"]})


def stream(server: RunningServer, content: Any, **options: Any) -> list[ChatCompletionChunk]:
    with server.client as client:
        return list(
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": content}],
                stream=True,
                **{"temperature": 0, "max_tokens": 12, **options},
            )
        )


def test_a_stream_adds_up_to_the_whole_response(server: RunningServer, wav: bytes) -> None:
    parts = [input_audio_part(wav), text_part("what is it?")]
    whole = server.ask(*parts, max_tokens=12, n=2, logprobs=True, top_logprobs=2)
    chunks = stream(server, parts, n=2, logprobs=True, top_logprobs=2, stream_options={"include_usage": True})
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert choices[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in choices) == whole["choices"][index]["message"]["content"]
        assert [c.finish_reason for c in choices if c.finish_reason] == [whole["choices"][index]["finish_reason"]]
        logprobs = [entry.to_dict() for c in choices if c.logprobs for entry in c.logprobs.content or ()]
        expected = whole["choices"][index]["logprobs"]["content"]
        assert [entry["token"] for entry in logprobs] == [entry["token"] for entry in expected]
        assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, name) == whole["usage"][name]
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_first_and_last_chunk_name_the_adapter(server: RunningServer, wav: bytes) -> None:
    chunks = [chunk.to_dict() for chunk in stream(server, [input_audio_part(wav)])]
    assert chunks[0]["lora"]["reason"] == chunks[-1]["lora"]["reason"] == "default:audio"  # type: ignore[index,call-overload]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_sampling_fields_reach_the_engine(server: RunningServer) -> None:
    question = text_part("tell me a story")
    greedy = server.ask(question, max_tokens=16)["choices"][0]["message"]["content"]
    hot = {"temperature": 5.0, "max_tokens": 16}
    seeded = [server.ask(question, seed=7, **hot)["choices"][0]["message"]["content"] for _ in range(2)]
    assert seeded[0] == seeded[1] != greedy
    assert server.ask(question, seed=8, **hot)["choices"][0]["message"]["content"] != seeded[0]
    assert server.ask(question, top_k=1, **hot)["choices"][0]["message"]["content"] == greedy
    banned = server.ask(question, max_tokens=16, logit_bias={str(token): -100 for token in range(7, 200)})
    assert banned["choices"][0]["message"]["content"] != greedy
    stopped = server.ask(question, max_tokens=16, stop=[greedy[3]])["choices"][0]
    assert stopped["message"]["content"] == greedy[: greedy.index(greedy[3])]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", greedy[3])
    short = server.ask(question, max_completion_tokens=3, max_tokens=3)
    assert (short["usage"]["completion_tokens"], short["choices"][0]["finish_reason"]) == (3, "length")
    assert len(short["choices"]) == 1 and len(server.ask(question, n=3)["choices"]) == 3


def test_a_client_that_disconnects_from_a_stream_aborts_its_request(
    server: RunningServer, aborted: list[RequestOutput]
) -> None:
    with server.client as client:
        response = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a long story"}], stream=True, **LONG
        )
        next(iter(response))
        response.close()
    wait_until_idle(server)
    assert [output.outputs[0].finish_reason for output in aborted] == ["abort"]


def test_a_client_that_is_killed_in_a_stream_aborts_its_request(
    server: RunningServer, aborted: list[RequestOutput]
) -> None:
    """The operating system closes the connection, not the client."""
    script = (
        "import httpx, json, sys\n"
        "body = {'messages': [{'role': 'user', 'content': 'a story'}], 'stream': True, 'max_tokens': 480,"
        " 'ignore_eos': True}\n"
        "with httpx.stream('POST', sys.argv[1] + '/v1/chat/completions', json=body, timeout=60) as response:\n"
        "    for line in response.iter_lines():\n"
        "        print(line, flush=True)\n"
    )
    before = server.ask(text_part("who is there?"))
    command = [sys.executable, "-c", script, server.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None and client.stdout.readline().startswith("data: ")
        client.kill()
    wait_until_idle(server)
    assert [output.outputs[0].finish_reason for output in aborted] == ["abort"]
    assert server.ask(text_part("who is there?"))["choices"] == before["choices"]


def test_a_client_that_disconnects_before_the_response_aborts_its_request(
    server: RunningServer, aborted: list[RequestOutput]
) -> None:
    body = {"messages": [{"role": "user", "content": "a story"}], "max_tokens": 480, "ignore_eos": True}
    leave_before_answer(server, "/v1/chat/completions", body)
    assert [output.outputs[0].finish_reason for output in aborted] == ["abort"]


def test_a_failure_in_the_middle_of_a_stream_reaches_the_client(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, calls = server.llm.engine.runner, []
    run = runner.run

    def fail_on_third(scheduled: Any) -> Any:
        calls.append(scheduled)
        if len(calls) == 3:
            raise MMLoRAError("broken on purpose")
        return run(scheduled)

    monkeypatch.setattr(runner, "run", fail_on_third)
    with pytest.raises(APIError, match="internal server error"):
        stream(server, "a story", **LONG)
    assert server.ask(text_part("still there?"))["usage"]["completion_tokens"] == 4
