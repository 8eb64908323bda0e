"""Tools in chat completions with the `openai` client: tool choices, whole and streamed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mmlora.errors import ConfigError
from mmlora.server.api import build_app
from mmlora.server.args import ServerArgs
from mmlora.server.launch import load_served_models
from mmlora.server.openai.tools import formats
from mmlora.server.openai.tools.choice import read_tool_choice
from tests.checkpoints import CHAT_TEMPLATE
from tests.server.conftest import RunningServer, ServerFactory, run_app
from tests.server.openai.tools.definitions import (
    ADD_CALL,
    CALL,
    MARKED,
    SCHEMAS,
    TEMPLATE,
    check_calls,
    prompt_of,
    say_tokens,
)


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


TOOLS = [tool(name, parameters=schema) for name, schema in SCHEMAS.items()]
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "go"}], "model": "tiny", "tools": TOOLS}
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module")
def server(start_server: ServerFactory) -> RunningServer:
    return start_server(chat_template=TEMPLATE)


def create(server: RunningServer, **options: Any) -> ChatCompletion:
    with server.client as client:
        answer = client.chat.completions.create(**{**ASK, "temperature": 3, "max_tokens": 200, **options})
    assert isinstance(answer, ChatCompletion)
    return answer


def create_stream(server: RunningServer, **options: Any) -> list[ChatCompletionChunk]:
    with server.client as client:
        stream = client.chat.completions.create(stream=True, **{**ASK, "temperature": 3, "max_tokens": 200, **options})
        return list(stream)


def joined(chunks: list[ChatCompletionChunk], index: int = 0) -> dict[str, Any]:
    """Join the chunks of one choice."""
    content, reason = "", None
    calls: dict[int, dict[str, str]] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices if choice.index == index):
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            assert call.function is not None
            if call.function.name is not None:
                assert call.index == len(calls) and call.id and call.type == "function"
                calls[call.index] = {"name": call.function.name, "arguments": ""}
            calls[call.index]["arguments"] += call.function.arguments or ""
    return {"content": content or None, "calls": list(calls.values()), "reason": reason}


def taken(answer: ChatCompletion, index: int = 0) -> dict[str, Any]:
    choice = answer.choices[index]
    calls = [
        {"name": call.function.name, "arguments": call.function.arguments}
        for call in choice.message.tool_calls or ()
        if call.type == "function"
    ]
    return {"content": choice.message.content or None, "calls": calls, "reason": choice.finish_reason}


def test_a_required_call_is_made(server: RunningServer) -> None:
    options: dict[str, Any] = {"tool_choice": "required", "seed": 1, "n": 6}
    answer, chunks = create(server, **options), create_stream(server, **options)
    found = [taken(answer, index) for index in range(6)]
    assert found == [joined(chunks, index) for index in range(6)]
    whole = [choice for choice in found if choice["reason"] == "tool_calls"]
    assert whole
    for choice in whole:
        assert choice["content"] is None and choice["calls"]
        check_calls(choice["calls"])
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or ()]
    assert len(set(ids)) == len(ids)


ANSWER = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
JSON_ANSWER = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER, "strict": True}}


@pytest.mark.parametrize("is_strict", [True, False])
def test_with_a_response_format_the_output_is_a_call_or_an_answer(server: RunningServer, is_strict: bool) -> None:
    """A model that generates random tokens does both, and nothing else."""
    spaces = [token for space in " \n\t\r" for token in server.llm.tokenizer.encode(space, add_special_tokens=False)]
    options: dict[str, Any] = {"response_format": JSON_ANSWER, "seed": 6, "n": 24, "parallel_tool_calls": False}
    options["tools"] = [tool("who", parameters=SCHEMAS["who"], strict=is_strict)]
    options["logit_bias"] = dict.fromkeys(map(str, spaces), -100)
    answer, chunks = create(server, **options), create_stream(server, **options)
    kinds = set()
    for index in range(24):
        found = taken(answer, index)
        assert found == joined(chunks, index)
        kinds.add(found["reason"])
        if found["reason"] == "tool_calls":
            assert found["content"] is None and found["calls"]
            check_calls(found["calls"])
        elif found["reason"] == "stop":
            assert not found["calls"]
            Draft202012Validator(ANSWER).validate(json.loads(found["content"]))
    assert {"tool_calls", "stop"} <= kinds


@pytest.mark.parametrize("response_format", [JSON_ANSWER, {"type": "json_object"}], ids=lambda value: value["type"])
def test_a_tool_choice_decides_between_call_and_answer(server: RunningServer, response_format: dict[str, Any]) -> None:
    for seed in range(3):
        options: dict[str, Any] = {"response_format": response_format, "seed": seed, "max_tokens": 8}
        assert taken(create(server, tool_choice="required", **options))["calls"]
        assert taken(create(server, tool_choice=NAMED, **options))["calls"][0]["name"] == "add"
        found = taken(create(server, tool_choice="none", **options))
        assert found["content"].startswith("{") and not found["calls"]
        assert taken(create(server, tools=[], **options))["content"].startswith("{")


def test_one_call_without_parallel_tool_calls(server: RunningServer) -> None:
    answer = create(server, tool_choice="required", parallel_tool_calls=False, n=8, seed=2)
    whole = [taken(answer, index) for index in range(8) if answer.choices[index].finish_reason == "tool_calls"]
    assert whole and all(len(choice["calls"]) == 1 for choice in whole)


@pytest.mark.parametrize("is_parallel", [None, True, False])
def test_the_constraint_allows_several_calls_unless_disabled(is_parallel: bool | None) -> None:
    constraint = read_tool_choice([tool("a")], "required", is_parallel).constraint
    assert constraint is not None and isinstance(constraint.json, dict)
    schema, call = Draft202012Validator(constraint.json), {"name": "a", "arguments": {}}
    assert schema.is_valid([call]) and not schema.is_valid([])
    assert schema.is_valid([call, call]) == (is_parallel is not False)


def test_a_named_tool_is_called(server: RunningServer) -> None:
    options: dict[str, Any] = {"tool_choice": NAMED, "seed": 3}
    found = taken(create(server, **options))
    chunks = create_stream(server, **options)
    assert found == joined(chunks)
    assert (found["reason"], found["content"], [call["name"] for call in found["calls"]]) == (
        "tool_calls",
        None,
        ["add"],
    )
    check_calls(found["calls"])
    assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks) > 3  # arguments are streamed


def test_max_tokens_truncates_a_call(server: RunningServer) -> None:
    named = taken(create(server, tool_choice=NAMED, max_tokens=4))
    assert named["reason"] == "length" and len(named["calls"]) == 1
    for num_tokens in (1, 4, 12, 16, 18, 40, 60):
        options: dict[str, Any] = {"tool_choice": "required", "max_tokens": num_tokens, "seed": 1, "n": 2}
        answer, chunks = create(server, **options), create_stream(server, **options)
        for index in range(2):
            required = taken(answer, index)
            assert required == joined(chunks, index) and required["content"] is None and required["calls"]
            assert required["reason"] == "length"
            for call in required["calls"]:
                assert any(name.startswith(call["name"]) for name in SCHEMAS) and "name" not in call["arguments"]


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_stop_string_leaves_a_call_incomplete(server: RunningServer, choice: Any) -> None:
    options: dict[str, Any] = {"tool_choice": choice, "seed": 3, "stop": [","]}
    found = taken(create(server, **options))
    assert found == joined(create_stream(server, **options))
    assert found["content"] is None and found["reason"] == "stop" and len(found["calls"]) == 1
    with pytest.raises(ValueError):
        json.loads(found["calls"][0]["arguments"])


@pytest.mark.parametrize("choice", [None, "auto"])
@pytest.mark.parametrize(
    ("text", "content", "names", "reason"),
    [
        (CALL, None, ["add"], "tool_calls"),
        (f"Wait.\n{CALL}\n{CALL}", "Wait.", ["add", "add"], "tool_calls"),
        ("No call.", "No call.", [], "stop"),
        (CALL.replace("add", "rm"), CALL.replace("add", "rm"), [], "stop"),
        (CALL.replace(": 1,", ": ,"), CALL.replace(": 1,", ": ,"), [], "stop"),
    ],
    ids=["call", "two calls", "none", "unknown tool", "no JSON"],
)
def test_a_model_may_call(
    server: RunningServer, say: Any, text: str, content: str | None, names: list[str], reason: str, choice: str | None
) -> None:
    say(text)
    options: dict[str, Any] = {"tools": [tool("add")], **({} if choice is None else {"tool_choice": choice})}
    found, chunks = taken(create(server, **options)), create_stream(server, **options)
    assert found == joined(chunks)
    assert (found["content"], [call["name"] for call in found["calls"]]) == (content, names)
    assert found["reason"] == reason
    check_calls(found["calls"])


def test_calls_have_logprobs_and_usage(server: RunningServer, say: Any) -> None:
    say(CALL)
    answer = create(server, logprobs=True)
    chunks = create_stream(server, logprobs=True, stream_options={"include_usage": True})
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and answer.usage is not None
    streamed = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content or ()]
    assert [entry.token for entry in streamed] == [entry.token for entry in logprobs.content]
    assert answer.usage.completion_tokens == len(CALL) == chunks[-1].usage.completion_tokens  # type: ignore[union-attr]


def test_text_is_kept_without_a_tool_choice(server: RunningServer, say: Any) -> None:
    say(CALL)
    assert taken(create(server, tool_choice="none"))["content"] == CALL


SPECIAL = re.compile(r"<\|\w+\|>")


@pytest.fixture(scope="module")
def marked(server: RunningServer) -> Iterator[RunningServer]:
    """A server of the same model whose calls are marked by special tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "FORMATS", (MARKED,))
        app = build_app(server.llm, load_served_models(server.llm))
    with run_app(app) as address:
        yield RunningServer(server.llm, address)


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (f"Wa<|system|>it.<|user|>{ADD_CALL}<|assistant|>\n<|user|>{ADD_CALL}<|assistant|>", "Wait.", ["add", "add"]),
        (f"<|user|>{ADD_CALL}<|assistant|>On<|system|>e.<|user|>{ADD_CALL}", "One.", ["add", "add"]),
        ("No<|system|> <|user|>call<|assistant|>.<|audio|>", "No call.", []),
        (f"<|user|>{ADD_CALL[:-9]}<|system|>", ADD_CALL[:-9], []),
        ("a <|user", "a <|user", []),
    ],
    ids=["two calls", "text between calls", "none", "incomplete", "not a token"],
)
def test_special_tokens_are_not_content(
    marked: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    content: str,
    names: list[str],
) -> None:
    say_tokens(marked, monkeypatch, text)
    options: dict[str, Any] = {"tools": [tool("add")], "logprobs": True}
    answer = create(marked, **options)
    found = taken(answer)
    assert found == joined(create_stream(marked, **options))
    assert (found["content"], [call["name"] for call in found["calls"]]) == (content, names)
    check_calls(found["calls"])
    logprobs = answer.choices[0].logprobs  # has every token
    assert logprobs is not None and "".join(entry.token for entry in logprobs.content or ()) == text


def test_special_tokens_are_kept_on_request(marked: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    say_tokens(marked, monkeypatch, f"Wa<|system|>it<|user|>!<|user|>{ADD_CALL}")
    options: dict[str, Any] = {"extra_body": {"skip_special_tokens": False}}
    found = taken(create(marked, **options))
    assert found == joined(create_stream(marked, **options))
    assert found["content"] == "Wa<|system|>it<|user|>!" and len(found["calls"]) == 1
    found = taken(create(marked, tool_choice="none"))
    assert found["content"] == f"Wait!{ADD_CALL}"


def test_random_output_has_no_special_tokens(marked: RunningServer) -> None:
    """Of random tokens, one in forty is special."""
    options: dict[str, Any] = {"max_tokens": 150, "temperature": 5, "n": 6, "seed": 5, "logprobs": True}
    choices = create(marked, **options, extra_body={"ignore_eos": True}).choices
    tokens = [entry.token for choice in choices for entry in choice.logprobs.content or ()]  # type: ignore[union-attr]
    assert {"<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"} <= set(tokens)
    for choice in choices:
        assert choice.message.content and not SPECIAL.search(choice.message.content)


HISTORY = [
    {"role": "user", "content": "go"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **tool("add", arguments='{"a": 1}')}]},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "three"}]},
]


def test_tools_calls_and_results_reach_the_template(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(server, monkeypatch, {"messages": HISTORY, "tools": [tool("add")]})
    assert prompt == (
        '<|system|>{"name": "add"}<|end|><|user|>go<|end|><|assistant|>'
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|end|><|tool|>three<|end|><|assistant|>'
    )
    prompt = prompt_of(server, monkeypatch, {"messages": HISTORY[:1], "tools": TOOLS, "tool_choice": "none"})
    assert prompt == "<|user|>go<|end|><|assistant|>"


def refused(server: RunningServer, **fields: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.address}/v1/chat/completions", json={**ASK, **fields}, timeout=60)
    assert response.status_code == 400, response.text
    return dict(response.json()["error"])


def history(**call: Any) -> list[dict[str, Any]]:
    return [HISTORY[0], {**HISTORY[1], "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "tools[0]"),
        ({"tools": [{"type": "custom", "function": {"name": "a"}}]}, "tools", "tools[0]"),
        ({"tools": [tool("a b")]}, "tools", "tools[0].function.name"),
        ({"tools": [tool("a"), tool("a")]}, "tools", "tools[1].function.name"),
        ({"tools": [tool("a", parameters=[])]}, "tools", "parameters"),
        ({"tools": [tool(f"t{i}") for i in range(129)]}, "tools", "128"),
        ({"tools": ["add"]}, "tools", "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice", "sometimes"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice", "'sub'"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": None, "tool_choice": NAMED}, "tool_choice", "'add'"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs", "tool_choice"),
        ({"response_format": {"type": "yaml"}}, "response_format", "yaml"),
        ({"tools": [tool("a", parameters={"type": "banana"})], "tool_choice": "required"}, "tools", "tools: "),
        ({"tools": [tool("a", parameters={"not": {}}, strict=True)], "tool_choice": "required"}, "tools", "not"),
        (
            {"messages": history(function={"name": "add", "arguments": "{"})},
            None,
            "messages[1].tool_calls[0].function.arg",
        ),
        ({"messages": history(function={"name": "add", "arguments": "[]"})}, None, "JSON object"),
        ({"messages": history(function={"arguments": "{}"})}, None, "messages[1].tool_calls[0]"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages", "messages[0]"),
        ({"messages": [{"role": "tool", "tool_call_id": "c1"}]}, "messages", "messages[0].content"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_tools_and_calls_are_refused(
    server: RunningServer, fields: dict[str, Any], param: str | None, text: str
) -> None:
    error = refused(server, **fields)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert text in error["message"]


def test_unsupported_schema_keywords_are_ignored_unless_tools_are_strict(server: RunningServer) -> None:
    tools = [tool("a", parameters={"properties": {"k": {"type": "string", "format": "odd", "not": {}}}})]
    assert create(server, tools=tools, tool_choice="required", max_tokens=1).choices[0].finish_reason == "length"


def test_a_template_without_tools_is_an_error(start_server: ServerFactory) -> None:
    plain = start_server()
    error = refused(plain, tool_choice="required")
    assert "does not support tools" in error["message"]
    error = refused(plain)
    assert error["param"] == "tool_choice" and "--tool-call-parser" in error["message"]
    error = refused(plain, messages=HISTORY, tools=[])
    assert "does not support tool_calls" in error["message"]


def test_automatic_tool_choice_can_be_disabled(server: RunningServer) -> None:
    app = build_app(server.llm, load_served_models(server.llm), tool_call_parser=None)
    with run_app(app) as address:
        error = refused(RunningServer(server.llm, address))
    assert "without automatic tool choice" in error["message"]


def test_a_parser_must_be_known() -> None:
    assert ServerArgs(tool_call_parser="mistral").tool_call_parser == "mistral"
    with pytest.raises(ConfigError, match="hermes"):
        ServerArgs(tool_call_parser="hermit")


def test_short_call_ids_where_templates_require_them(server: RunningServer) -> None:
    app = build_app(server.llm, load_served_models(server.llm), tool_call_parser="mistral")
    with run_app(app) as address:
        answer = create(RunningServer(server.llm, address), tool_choice=NAMED, max_tokens=4)
    assert re.fullmatch("[A-Za-z0-9]{9}", (answer.choices[0].message.tool_calls or [])[0].id)


PHI4_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{- '<|' + message['role'] + '|>' -}}",
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'system' and 'tools' in message -%}"
    "{{- message['content'] + '<|tool|>' + message['tools'] + '<|/tool|><|end|>' -}}{%- continue -%}{%- endif -%}",
)


def test_phi4_gets_tools_in_its_system_message(start_server: ServerFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    phi4 = start_server(chat_template=PHI4_TEMPLATE)
    tokenizer = phi4.llm.tokenizer
    known = type(tokenizer).convert_tokens_to_ids
    monkeypatch.setattr(
        type(tokenizer), "convert_tokens_to_ids", lambda self, t: 9 if t == "<|tool_call|>" else known(self, t)
    )
    tools = '<|tool|>[{"name": "add"}]<|/tool|><|end|>'
    prompt = prompt_of(phi4, monkeypatch, {"messages": HISTORY, "tools": [tool("add")]})
    call = '<|assistant|><|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|/tool_call|><|end|>'
    assert prompt == f"<|system|>{tools}<|user|>go<|end|>{call}<|tool|>three<|end|><|assistant|>"
    system = {"role": "system", "content": "be kind"}
    prompt = prompt_of(phi4, monkeypatch, {"messages": [system, HISTORY[0]], "tools": [tool("add")]})
    assert prompt.startswith(f"<|system|>be kind{tools}<|user|>go")
