"""Reasoning in chats and responses with the `openai` client: outputs, efforts and histories."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response, ResponseOutputMessage, ResponseReasoningItem

from mmlora.errors import ConfigError
from mmlora.server.api import build_app
from mmlora.server.args import ServerArgs
from mmlora.server.launch import load_served_models
from mmlora.server.openai.responses.input import as_messages
from tests.server.conftest import RunningServer, ServerFactory, run_app
from tests.server.openai.responses import checked, respond, stream
from tests.server.openai.tools.definitions import ADD_CALL, CALL, prompt_of

TEMPLATE = (
    "{%- for tool in tools or [] -%}{{ tool.function | tojson }}{%- endfor -%}"
    "{%- for message in messages -%}<|{{ message.role }}|>"
    "{%- if message.reasoning_content -%}<think>{{ message.reasoning_content }}</think>{%- endif -%}"
    "{{ message.content }}"
    "{%- for call in message.tool_calls or [] -%}<tool_call>{{ call.function | tojson }}</tool_call>{%- endfor -%}"
    "<|end|>{%- endfor -%}<|assistant|>"
    "{%- if enable_thinking is defined -%}"
    "{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{%- endif -%}"
)
EFFORT_TEMPLATE = "{{ reasoning_effort }}{% for message in messages %}{{ message.content }}{% endfor %}{{ thinking }}"
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "go"}], "max_tokens": 150, "seed": 1}
THOUGHT = "<think>\nWhy <b>?\n</think>"
OPEN = {"chat_template_kwargs": {"enable_thinking": True}}
CLOSED = {"chat_template_kwargs": {"enable_thinking": False}}
ADD = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module")
def server(start_server: ServerFactory) -> RunningServer:
    return start_server(chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def with_effort(start_server: ServerFactory) -> RunningServer:
    return start_server(chat_template=EFFORT_TEMPLATE)


@pytest.fixture(scope="module")
def plain(start_server: ServerFactory) -> RunningServer:
    return start_server()


def ask(server: RunningServer, **fields: Any) -> dict[int, dict[str, Any]]:
    """Return reasoning, content, calls and finish reason of each choice, and check that a stream has the same."""
    body = {**ASK, **fields}
    with server.client as client:
        names = ("messages", "model", "max_tokens", "n", "tools", "seed", "temperature", "stop", "response_format")
        given = {name: body.pop(name) for name in names if name in body}
        answer = client.chat.completions.create(**given, extra_body=body)
        chunks = list(client.chat.completions.create(**given, extra_body=body, stream=True))
    assert isinstance(answer, ChatCompletion)
    whole, streamed = {}, {}
    for choice in answer.choices:
        message = choice.message.to_dict()
        assert message.get("reasoning") == message.get("reasoning_content")
        calls = [call["function"]["name"] for call in message.get("tool_calls", [])]  # type: ignore[attr-defined]
        whole[choice.index] = {"reasoning": message.get("reasoning"), "content": message["content"], "calls": calls}
        whole[choice.index]["reason"] = choice.finish_reason
        streamed[choice.index] = {"reasoning": "", "content": "", "calls": list[str]()}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        delta, found = choice.delta.to_dict(), streamed[choice.index]
        assert delta.get("reasoning") == delta.get("reasoning_content")
        found["reasoning"] += delta.get("reasoning", "")
        found["content"] += delta.get("content") or ""
        functions = [call["function"] for call in delta.get("tool_calls", [])]  # type: ignore[attr-defined]
        found["calls"] += [function["name"] for function in functions if "name" in function]
        found["reason"] = choice.finish_reason or found.get("reason")
    assert {
        index: {**found, "reasoning": found["reasoning"] or "", "content": found["content"] or ""}
        for index, found in whole.items()
    } == streamed
    return whole


def test_reasoning_is_not_content(server: RunningServer, say: Callable[[str], None]) -> None:
    say(f"{THOUGHT}\n\nSo <c>.")
    expected = {"reasoning": "Why <b>?", "content": "So <c>.", "calls": [], "reason": "stop"}
    assert ask(server, n=2) == {0: expected, 1: expected}
    say("Why <b>?\n</think>\n\nSo <c>.")
    assert ask(server, **OPEN) == {0: expected}
    say("So <c>.")
    assert ask(server) == ask(server, **CLOSED) == {0: {**expected, "reasoning": None}}


def test_reasoning_tokens_are_counted(server: RunningServer, say: Callable[[str], None]) -> None:
    for text, num_tokens in ((f"{THOUGHT}\n\nSo.", len(THOUGHT)), ("So.", 0)):
        say(text)
        body = {**ASK, "n": 2, "stream_options": {"include_usage": True}}
        with server.client as client:
            usage = client.chat.completions.create(**{**body, "stream_options": None}).usage
            assert client.chat.completions.create(**body, stream=True).response.is_success
            last = list(client.chat.completions.create(**body, stream=True))[-1]
        assert usage == last.usage and usage is not None and usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.reasoning_tokens == 2 * num_tokens
        response = respond(server, "go", max_output_tokens=150)
        assert response.usage is not None
        assert response.usage.output_tokens_details.reasoning_tokens == num_tokens


def test_an_output_may_end_inside_the_reasoning(server: RunningServer, say: Callable[[str], None]) -> None:
    say(f"{THOUGHT}\n\nSo.")
    assert ask(server, max_tokens=12)[0] == {"reasoning": "Why", "content": None, "calls": [], "reason": "length"}
    assert ask(server, stop=["y <"])[0] == {"reasoning": "Wh", "content": None, "calls": [], "reason": "stop"}
    assert ask(server, stop=["think"])[0] == {"reasoning": None, "content": "<", "calls": [], "reason": "stop"}
    found = respond(server, "go", max_output_tokens=12)
    (item,) = found.output
    assert (found.status, item.type, item.status) == ("incomplete", "reasoning", "incomplete")  # type: ignore[union-attr]


def test_calls_follow_the_reasoning(server: RunningServer, say: Callable[[str], None]) -> None:
    say(f"<think>{CALL}</think>\nWait.{CALL}")
    expected = {"reasoning": CALL, "content": "Wait.", "calls": ["add"], "reason": "tool_calls"}
    assert ask(server, tools=[ADD], max_tokens=250)[0] == expected
    say(f"<think>{CALL}</think>[{ADD_CALL}]")
    found = ask(server, tools=[ADD], tool_choice="required")[0]
    assert found == {"reasoning": CALL, "content": None, "calls": ["add"], "reason": "tool_calls"}
    found = ask(server, tools=[ADD], tool_choice="required", max_tokens=20)[0]
    assert found == {"reasoning": CALL[:13].rstrip(), "content": None, "calls": [], "reason": "length"}


def test_constraints_start_after_the_reasoning(server: RunningServer) -> None:
    bias = {str(token): -100 for token in server.llm.tokenizer("<", add_special_tokens=False).input_ids}
    constraint: dict[str, Any] = {"structured_outputs": {"choice": ["xy", "xyz"]}, "logit_bias": bias}
    assert ask(server, **constraint, **CLOSED)[0]["content"] in ("xy", "xyz")
    assert ask(server, **constraint)[0]["content"] in ("xy", "xyz")
    found = ask(server, **constraint, **OPEN, max_tokens=20)[0]
    assert found["content"] is None and found["reasoning"]
    for fields in ({"response_format": {"type": "json_object"}}, {"tools": [ADD], "tool_choice": "required"}):
        found = ask(server, **fields, **OPEN, max_tokens=20, logit_bias=bias)[0]
        assert (found["content"], found["calls"]) == (None, []) and found["reasoning"]


def test_responses_have_reasoning_items(server: RunningServer, say: Callable[[str], None]) -> None:
    say(f"{THOUGHT}\n\nWait.{CALL}")
    tools: Any = [{"type": "function", "name": "add"}]
    options: dict[str, Any] = {"max_output_tokens": 150, "tools": tools, "include": ["message.output_text.logprobs"]}
    whole = respond(server, "go", **options)
    events = stream(server, "go", **options)
    kinds = checked(events)
    start = ["response.output_item.added", "response.content_part.added", "response.reasoning_text.delta"]
    assert kinds[2:5] == start
    end = kinds.index("response.reasoning_text.done")
    assert set(kinds[4:end]) == {"response.reasoning_text.delta"}
    assert kinds[end : end + 4] == [
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
    ]
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "Why <b>?"
    for response in (whole, events[-1].response):  # type: ignore[union-attr]
        assert isinstance(response, Response)
        reasoning, message, call = response.output
        assert isinstance(reasoning, ResponseReasoningItem) and reasoning.content and reasoning.id.startswith("rs_")
        assert (reasoning.content[0].text, reasoning.status, reasoning.summary) == ("Why <b>?", "completed", [])
        assert isinstance(message, ResponseOutputMessage) and message.content[0].type == "output_text"
        assert "".join(token.token for token in message.content[0].logprobs or ()) == message.content[0].text == "Wait."
        assert call.type == "function_call" and call.name == "add"


def test_reasoning_of_earlier_turns_reaches_the_template(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, say: Callable[[str], None]
) -> None:
    user, after = ASK["messages"], {"role": "user", "content": "on"}
    expected = "<|user|>go<|end|><|assistant|><think>Why?</think>So.<|end|><|user|>on<|end|><|assistant|>"
    for name in ("reasoning", "reasoning_content"):
        turn = {"role": "assistant", "content": "So.", name: "Why?"}
        assert prompt_of(server, monkeypatch, {"messages": [*user, turn, after]}) == expected
    part = {"type": "reasoning_text", "text": "Why?"}
    so = {"role": "assistant", "content": "So."}
    for item in (
        {"summary": [], "content": [part]},
        {"summary": [{"type": "summary_text", "text": "Why?"}], "encrypted_content": "x"},
    ):
        given = [*user, {"type": "reasoning", "id": "rs_1", **item}, so, after]
        assert prompt_of(server, monkeypatch, {"input": given}, "responses") == expected
    hidden = [*user, {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}, so, after]
    assert "<think>" not in prompt_of(server, monkeypatch, {"input": hidden}, "responses")
    say(f"{THOUGHT}{CALL}")
    tools: Any = [{"type": "function", "name": "add"}]
    items = [item.to_dict() for item in respond(server, "go", max_output_tokens=150, tools=tools).output]
    given = [*user, *items, {"type": "function_call_output", "call_id": items[1]["call_id"], "output": "2"}]
    prompt = prompt_of(server, monkeypatch, {"input": given}, "responses")
    assert f"<|assistant|><think>Why <b>?</think><tool_call>{ADD_CALL}" in prompt


def test_many_reasoning_items_take_linear_time() -> None:
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x" * 200}]}
    start = time.process_time()
    messages = as_messages(None, [item] * 30_000 + [{"role": "assistant", "content": "So."}])
    assert time.process_time() - start < 5
    reasoning = "\n\n".join(["x" * 200] * 30_000)
    assert messages == [{"role": "assistant", "content": "So.", "reasoning_content": reasoning}]


@pytest.mark.parametrize(
    ("item", "place"),
    [
        ({"content": "Why?"}, "input[1].content"),
        ({"content": ["Why?"]}, "input[1].content[0]"),
        ({"content": [{"type": "reasoning_text"}]}, "input[1].content[0].text"),
        ({"summary": [{"type": "text", "text": "x"}]}, "input[1].summary[0]"),
    ],
)
def test_a_malformed_reasoning_item_is_named(server: RunningServer, item: dict[str, Any], place: str) -> None:
    body = {"input": [{"role": "user", "content": "go"}, {"type": "reasoning", **item}]}
    response = httpx.post(f"{server.address}/v1/responses", json=body, timeout=60)
    assert (response.status_code, response.json()["error"]["param"]) == (400, place)


def sent(server: RunningServer, path: str = "chat/completions", **fields: Any) -> httpx.Response:
    limit = "max_output_tokens" if path == "responses" else "max_tokens"
    given = {"responses": {"input": "go"}, "completions": {"prompt": "go"}}.get(path, {"messages": ASK["messages"]})
    return httpx.post(f"{server.address}/v1/{path}", json={**given, limit: 1, **fields}, timeout=60)


def test_no_effort_is_accepted_everywhere(plain: RunningServer, server: RunningServer) -> None:
    for where in (plain, server):
        for path in ("chat/completions", "completions", "responses"):
            verbosity = {"text": {"verbosity": "medium"}} if path == "responses" else {"verbosity": "medium"}
            for effort in ("none", None):
                response = sent(where, path, reasoning_effort=effort, **verbosity)
                assert response.status_code == 200, response.text
        for reasoning in ({"effort": "none"}, {"effort": None, "summary": "auto"}, {"effort": "none", "summary": None}):
            assert sent(where, reasoning=reasoning).status_code == 200
            response = sent(where, "responses", reasoning=reasoning)
            assert response.json()["reasoning"] == {"effort": None, "summary": None, **reasoning}


@pytest.mark.parametrize("effort", ["high", "huge", ["high"]])
def test_an_effort_that_is_refused_is_named(plain: RunningServer, effort: Any) -> None:
    error = sent(plain, reasoning={"effort": effort}).json()["error"]
    assert error["param"] == "reasoning" and error["message"].startswith(f"reasoning.effort={json.dumps(effort)} ")
    error = sent(plain, reasoning_effort=str(effort)).json()["error"]
    assert error["param"] == "reasoning_effort" and error["message"].startswith(f'reasoning_effort="{effort}" '), error


def test_an_effort_reaches_the_template(
    server: RunningServer, with_effort: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = ASK["messages"]
    for fields, end in (
        ({}, "<|assistant|>"),
        ({"reasoning_effort": "none"}, "<think>\n\n</think>\n\n"),
        ({"reasoning_effort": "low"}, "<think>\n"),
        ({"reasoning": {"effort": "high"}}, "<think>\n"),
        ({"reasoning_effort": "high", **CLOSED}, "<think>\n\n</think>\n\n"),
    ):
        assert prompt_of(server, monkeypatch, {"messages": messages, **fields}).endswith(end)
        fields.pop("reasoning_effort", None) is None or fields.update(reasoning={"effort": "none"})
    for effort, on in (("none", False), ("minimal", True), ("xhigh", True)):
        expected = f"{effort}go{on}"
        assert prompt_of(with_effort, monkeypatch, {"messages": messages, "reasoning_effort": effort}) == expected
        body = {"input": "go", "reasoning": {"effort": effort}}
        assert prompt_of(with_effort, monkeypatch, body, "responses") == expected


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"reasoning_effort": "high"}, "reasoning_effort", "enable_thinking"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "enable_thinking"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "xhigh"),
        ({"reasoning": {"effort": ["low"]}}, "reasoning", "xhigh"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "auto"),
        ({"reasoning": {"budget": 5}}, "reasoning.budget", "5"),
        ({"reasoning": {"effort": "none"}, "reasoning_effort": "low"}, "reasoning_effort", "differ"),
        ({"verbosity": "low"}, "verbosity", "medium"),
    ],
    ids=str,
)
def test_other_efforts_are_refused_by_name(plain: RunningServer, fields: dict[str, Any], param: str, text: str) -> None:
    for path in ("chat/completions", "responses"):
        if path == "responses" and "verbosity" in fields:
            continue
        response = sent(plain, path, **fields)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param) and text in error["message"]


def test_the_parser_is_an_option(server: RunningServer, say: Callable[[str], None]) -> None:
    assert ServerArgs(reasoning_parser="deepseek_r1").reasoning_parser == "deepseek_r1"
    with pytest.raises(ConfigError, match="qwen3"):
        ServerArgs(reasoning_parser="qwen")
    say(f"{THOUGHT}So.")
    for name, content in (("none", f"{THOUGHT}So."), ("deepseek_r1", "So."), ("mistral", f"{THOUGHT}So.")):
        app = build_app(server.llm, load_served_models(server.llm), reasoning_parser=name)
        with run_app(app) as address:
            assert ask(RunningServer(server.llm, address))[0]["content"] == content
