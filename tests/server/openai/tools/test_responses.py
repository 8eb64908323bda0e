"""Tools in responses with the `openai` client: calls as items, whole and streamed, and function call outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseStreamEvent

from mmlora.errors import MMLoRAError
from mmlora.server.api import build_app
from mmlora.server.launch import load_served_models
from mmlora.server.openai.tools import formats
from tests.server.conftest import RunningServer, ServerFactory, post_json, run_app
from tests.server.openai.responses import checked, respond, stream
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

INFINITE = "1e999"  # sent as a number
LOGPROBS = "message.output_text.logprobs"


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "name": name, **fields}


TOOLS = [tool(name, parameters=schema) for name, schema in SCHEMAS.items()]
NAMED = {"type": "function", "name": "add"}
CALLING: dict[str, Any] = {"tools": TOOLS, "temperature": 3, "max_output_tokens": 200}
FREE: dict[str, Any] = {"tools": [tool("add"), tool("who")], "max_output_tokens": 250}


@pytest.fixture(scope="module")
def server(start_server: ServerFactory) -> RunningServer:
    return start_server(chat_template=TEMPLATE)


def items_of(response: Response) -> list[Any]:
    """Return the items of a response without ids: a text, or the name and arguments of a call, and the status."""
    items: list[Any] = []
    for item in response.output:
        if isinstance(item, ResponseFunctionToolCall):
            assert item.id and item.id.startswith("fc_") and item.call_id.startswith("call_")
            items.append((item.name, item.arguments, item.status))
        else:
            assert isinstance(item, ResponseOutputMessage) and item.content[0].type == "output_text"
            items.append((item.content[0].text, item.status))
    ids = [item.id for item in response.output]
    assert len(set(ids)) == len(ids)
    return items


def gathered(events: list[ResponseStreamEvent]) -> Response:
    """Return the final response of a stream, and check that the events of each item add up to it."""
    checked(events)
    final: Response = events[-1].response  # type: ignore[union-attr]
    place, texts = -1, [""] * len(final.output)
    for event in events[2:-1]:
        place += event.type == "response.output_item.added"
        assert event.output_index == place  # type: ignore[union-attr]
        item = final.output[place]
        match event.type:
            case "response.output_item.added":
                assert (event.item.id, event.item.status) == (item.id, "in_progress")  # type: ignore[union-attr]
            case "response.output_text.delta" | "response.function_call_arguments.delta":
                assert event.item_id == item.id
                texts[place] += event.delta
            case "response.function_call_arguments.done":
                assert event.item_id == item.id
                assert event.arguments == item.arguments == texts[place]  # type: ignore[union-attr]
            case "response.output_text.done":
                assert event.text == item.content[0].text == texts[place]  # type: ignore[union-attr]
            case "response.output_item.done":
                assert event.item == item
    assert place == len(final.output) - 1
    return final


def test_a_required_call_is_made(server: RunningServer) -> None:
    """The output equals that of a chat with the same seed."""
    # Without this, the model generates whitespace between two JSON tokens.
    spaces = [token for space in " \n" for token in server.llm.tokenizer.encode(space, add_special_tokens=False)]
    num_whole = 0
    for seed in range(3):
        fields = {"seed": seed, "logit_bias": dict.fromkeys(map(str, spaces), -100)}
        options: dict[str, Any] = {**CALLING, "tool_choice": "required", "extra_body": fields}
        response = respond(server, "go", **options)
        assert items_of(response) == items_of(gathered(stream(server, "go", **options)))
        chat = chat_of(server, {"tool_choice": "required", **fields})
        if response.status == "completed":
            num_whole += 1
            calls = [item.to_dict() for item in response.output]
            assert {(call["type"], call["status"]) for call in calls} == {("function_call", "completed")}
            assert [(call["name"], call["arguments"]) for call in calls] == chat
            check_calls(calls)  # type: ignore[arg-type]
    assert num_whole


def chat_of(server: RunningServer, fields: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the tool calls of a chat."""
    tools = [{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in TOOLS]
    body = {"messages": [{"role": "user", "content": "go"}], "tools": tools, "temperature": 3, "max_tokens": 200}
    answer = httpx.post(f"{server.address}/v1/chat/completions", json={**body, **fields}, timeout=60)
    calls = answer.json()["choices"][0]["message"].get("tool_calls", [])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def test_the_arguments_of_a_named_tool_are_streamed(server: RunningServer) -> None:
    options: dict[str, Any] = {**CALLING, "tool_choice": NAMED, "extra_body": {"seed": 3}}
    events = stream(server, "go", **options)
    kinds = checked(events)
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert set(kinds[3:-3]) == {"response.function_call_arguments.delta"} and len(kinds) > 10
    assert kinds[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    (item,) = items_of(gathered(events))
    assert [item] == items_of(respond(server, "go", **options))
    name, arguments, status = item
    assert (name, status) == ("add", "completed")
    check_calls([{"name": name, "arguments": arguments}])
    fields = {"tool_choice": {"type": "function", "function": {"name": "add"}}, "seed": 3}
    assert chat_of(server, fields) == [(name, arguments)]


def test_max_output_tokens_truncates_a_call(server: RunningServer, say: Callable[[str], None]) -> None:
    named = respond(server, "go", **CALLING | {"tool_choice": NAMED, "max_output_tokens": 4})
    (item,) = items_of(named)
    assert named.status == item[2] == "incomplete" and item[0] == "add"
    for num_tokens in (1, 4, 12, 16, 18, 40, 60):
        options: dict[str, Any] = {
            "tool_choice": "required",
            "max_output_tokens": num_tokens,
            "extra_body": {"seed": 1},
        }
        required = respond(server, "go", **CALLING | options)
        items = items_of(required)
        assert items == items_of(gathered(stream(server, "go", **CALLING | options)))
        assert required.status == "incomplete" and all(item.type == "function_call" for item in required.output)
        assert [item[2] for item in items[:-1]] == ["completed"] * (len(items) - 1)
        assert items[-1][2] == ("completed" if items[-1][1].endswith("}") else "incomplete")
    say(f"{CALL}\n{CALL}")
    cut = gathered(stream(server, "go", tools=TOOLS, max_output_tokens=len(CALL) + 1))
    assert [item[2] for item in items_of(cut)] == ["completed"] and cut.status == "incomplete"


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_stop_string_leaves_a_call_incomplete(server: RunningServer, choice: Any) -> None:
    options = {"tool_choice": choice, "extra_body": {"seed": 3, "stop": [","]}}
    found = respond(server, "go", **CALLING | options)
    ((_, _, status),) = items_of(found)
    assert (found.status, status) == ("completed", "incomplete")
    assert items_of(gathered(stream(server, "go", **CALLING | options))) == items_of(found)


ADDED = ("add", '{"a": 1, "to": "x"}', "completed")


@pytest.mark.parametrize(
    ("text", "items"),
    [
        (CALL, [ADDED]),
        (f"Wait.\n{CALL}\n{CALL}", [("Wait.", "completed"), ADDED, ADDED]),
        (f"{CALL}\nDone.{CALL}", [ADDED, ("Done.", "completed"), ADDED]),
        ("No <call.", [("No <call.", "completed")]),
        (CALL.replace("add", "rm"), [(CALL.replace("add", "rm"), "completed")]),
    ],
    ids=["call", "text and two calls", "text between calls", "none", "unknown tool"],
)
def test_a_model_may_call(server: RunningServer, say: Callable[[str], None], text: str, items: list[Any]) -> None:
    say(text)
    assert items_of(respond(server, "go", **FREE)) == items
    assert items_of(gathered(stream(server, "go", **FREE))) == items


def test_with_a_format_the_output_is_a_call_or_an_answer(server: RunningServer) -> None:
    """The output equals that of a chat with the same seed."""
    spaces = [token for space in " \n\t\r" for token in server.llm.tokenizer.encode(space, add_special_tokens=False)]
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    kinds = set()
    for seed in range(12):
        fields = {"seed": seed, "logit_bias": dict.fromkeys(map(str, spaces), -100)}
        text: Any = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
        options: dict[str, Any] = {**CALLING, "text": text, "extra_body": fields}
        response = respond(server, "go", **options)
        items = items_of(response)
        assert items == items_of(gathered(stream(server, "go", **options)))
        chat = {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}
        calls = [item[:2] for item in items if len(item) == 3]
        assert calls == chat_of(server, {**fields, **chat})
        if response.status == "completed":
            kinds |= {item.type for item in response.output}
            assert calls or json.loads(items[0][0]) in ({"ok": True}, {"ok": False})
            check_calls([{"name": name, "arguments": arguments} for name, arguments in calls])
    assert kinds == {"message", "function_call"}


def test_a_call_is_sent_as_soon_as_it_is_complete(server: RunningServer, say: Callable[[str], None]) -> None:
    say(f"{CALL}\nDone.")
    kinds = checked(stream(server, "go", **FREE))
    assert kinds[2:7] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.output_item.added",
    ]
    assert kinds[7:9] == ["response.content_part.added", "response.output_text.delta"]


def test_the_stream_helper_of_the_client_returns_the_whole_response(
    server: RunningServer, say: Callable[[str], None]
) -> None:
    say(f"Wait.\n{CALL}\n{CALL}")
    whole = respond(server, "go", **FREE)
    with (
        server.client as client,
        client.responses.stream(model="tiny", input="go", **FREE) as events,
    ):
        snapshots = [event.snapshot for event in events if event.type == "response.function_call_arguments.delta"]
        final = events.get_final_response()
    assert snapshots == [ADDED[1], ADDED[1]]
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
    assert items_of(final) == items_of(whole)
    assert final.usage == whole.usage
    calls = [item for item in final.output if item.type == "function_call"]
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "3"} for call in calls]
    say("Thanks.")
    conversation: list[Any] = [{"role": "user", "content": "go"}, *final.output, *outputs]
    assert items_of(respond(server, conversation, **FREE)) == [("Thanks.", "completed")]


def test_an_output_without_text_is_an_empty_message(server: RunningServer, say: Callable[[str], None]) -> None:
    say("x")
    options: dict[str, Any] = {**FREE, "extra_body": {"stop": "x"}}
    events = stream(server, "go", **options)
    assert "response.output_text.delta" not in checked(events)
    assert items_of(gathered(events)) == items_of(respond(server, "go", **options)) == [("", "completed")]


def test_only_text_has_log_probabilities(server: RunningServer, say: Callable[[str], None]) -> None:
    say(f"Wait.\n{CALL}\nDone <b.")
    options: dict[str, Any] = {**FREE, "include": [LOGPROBS], "extra_body": {"seed": 1}}
    responses = [respond(server, "go", **options), gathered(stream(server, "go", **options))]
    for response in responses:
        first, call, last = response.output
        assert call.type == "function_call" and response.usage and response.usage.output_tokens > len(CALL)
        for item, text in ((first, "Wait."), (last, "Done <b.")):
            part: Any = item.content[0]  # type: ignore[union-attr]
            assert "".join(token.token for token in part.logprobs) == part.text == text


def test_special_tokens_are_not_text(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "FORMATS", (MARKED,))
        app = build_app(server.llm, load_served_models(server.llm))
    say_tokens(server, monkeypatch, f"Wa<|system|>it.<|user|>{ADD_CALL}<|assistant|>On<|system|>e.<|audio|>")
    options: dict[str, Any] = {**FREE, "include": [LOGPROBS]}
    with run_app(app) as address:
        marked = RunningServer(server.llm, address)
        whole, streamed = respond(marked, "go", **options), gathered(stream(marked, "go", **options))
    assert items_of(whole) == items_of(streamed) == [("Wait.", "completed"), ADDED, ("One.", "completed")]
    for response in (whole, streamed):
        for place, text in ((0, "Wa<|system|>it."), (2, "On<|system|>e.<|audio|>")):
            part: Any = response.output[place].content[0]  # type: ignore[union-attr]
            assert "".join(token.token for token in part.logprobs) == text


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "go"},
    {"role": "assistant", "content": "Wait."},
    {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
    {"type": "function_call", "call_id": "c2", "name": "who", "arguments": "{}", "status": "completed"},
    {"type": "function_call_output", "call_id": "c2", "output": "me"},
    {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "three"}]},
    {"type": "function_call", "call_id": "c3", "name": "who", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c3", "output": "you"},
]


def test_tools_calls_and_outputs_reach_the_template(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt equals that of a chat in which each assistant turn is one message."""

    def called(call_id: str, name: str, arguments: str) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    messages = [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": "Wait.",
            "tool_calls": [called("c1", "add", '{"a": 1}'), called("c2", "who", "{}")],
        },
        {"role": "tool", "tool_call_id": "c2", "content": "me"},
        {"role": "tool", "tool_call_id": "c1", "content": "three"},
        {"role": "assistant", "content": None, "tool_calls": [called("c3", "who", "{}")]},
        {"role": "tool", "tool_call_id": "c3", "content": "you"},
    ]
    given = {"name": "add", "description": "Adds.", "parameters": {}, "strict": False}
    body = {"input": HISTORY, "tools": [{"type": "function", **given}, tool("who", description=None, parameters=None)]}
    prompt = prompt_of(server, monkeypatch, body, "responses")
    nested = [{"type": "function", "function": given}, {"type": "function", "function": {"name": "who"}}]
    assert prompt == prompt_of(server, monkeypatch, {"messages": messages, "tools": nested})
    assert '{"name": "add", "description": "Adds.", "parameters": {}, "strict": false}' in prompt
    assert '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in prompt
    without_tools = prompt_of(server, monkeypatch, {**body, "tool_choice": "none"}, "responses")
    assert "Adds." not in without_tools and "<tool_call>" in without_tools


def test_calls_and_their_outputs_are_sent_back(server: RunningServer) -> None:
    conversation: list[Any] = [{"role": "user", "content": "go"}]
    options: dict[str, Any] = {**FREE, "tools": TOOLS[:1], "tool_choice": NAMED, "extra_body": {"seed": 3}}
    first = respond(server, conversation, **options)
    (call,) = first.output
    assert call.type == "function_call" and first.status == "completed" and first.usage
    conversation += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "three"}]
    second = respond(server, conversation, **options)
    expected = json.dumps(json.loads(call.arguments)) + "three"  # every character is a token
    assert second.usage and second.usage.input_tokens > first.usage.input_tokens + len(expected)
    conversation = conversation[:-1] + [{**conversation[-1], "call_id": "another"}]
    items = [item if isinstance(item, dict) else item.to_dict() for item in conversation]
    assert refused(server, input=items)["param"] == ("input[2].call_id")


def test_text_is_kept_without_a_tool_choice(server: RunningServer, say: Callable[[str], None]) -> None:
    say(CALL)
    response = respond(server, "go", **FREE, tool_choice="none")
    assert items_of(response) == [(CALL, "completed")] and len(response.tools) == 2


def test_a_response_repeats_its_tools(server: RunningServer) -> None:
    add = tool("add", description="Adds.", parameters=SCHEMAS["add"], strict=True)
    sent = {**add, "async": False, "allowed_callers": ["direct"], "defer_loading": None}
    options: dict[str, Any] = {"tools": [sent, tool("who")], "max_output_tokens": 1}
    plain = respond(server, "go", **options).to_dict()
    assert (plain["tool_choice"], plain["parallel_tool_calls"]) == ("auto", True)
    assert plain["tools"] == [
        {**add, "async": False, "allowed_callers": ["direct"]},
        tool("who", description=None, parameters=None, strict=None),
    ]
    choice = {**NAMED, "more": 3}
    response = respond(server, "go", **options, tool_choice=choice, parallel_tool_calls=False).to_dict()
    assert (response["tool_choice"], response["parallel_tool_calls"]) == (NAMED, False)


def test_one_call_without_parallel_tool_calls(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    given, make = [], server.llm.engine.default_sampling_params
    monkeypatch.setattr(
        server.llm.engine, "default_sampling_params", lambda **options: given.append(options) or make(**options)
    )
    for is_parallel in (True, False):
        options = {"tool_choice": "required", "parallel_tool_calls": is_parallel, "max_output_tokens": 1}
        respond(server, "go", **CALLING | options)
    assert [options["structured_outputs"].json.get("maxItems") for options in given] == [None, 1]


def test_a_failure_in_the_middle_of_a_call_ends_it(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, steps = server.llm.engine.runner, []
    run = runner.run

    def fail_on_fourth(scheduled: Any) -> Any:
        steps.append(scheduled)
        if len(steps) == 4:
            raise MMLoRAError("broken on purpose")
        return run(scheduled)

    monkeypatch.setattr(runner, "run", fail_on_fourth)
    events = stream(server, "go", **CALLING, tool_choice=NAMED)
    assert checked(events)[-1] == "response.failed"
    ((name, arguments, status),) = items_of(events[-1].response)  # type: ignore[union-attr]
    assert (name, status) == ("add", "incomplete") and arguments.startswith("{")


def refused(server: RunningServer, **fields: Any) -> dict[str, Any]:
    body = {"input": "go", "tools": TOOLS, "max_output_tokens": 1, **fields}
    content = json.dumps(body).replace(f'"{INFINITE}"', INFINITE)
    response = post_json(f"{server.address}/v1/responses", content)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and len(str(error)) < 600
    return dict(error)


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tools": [{"type": "function", "function": {"name": "add"}}]}, "tools", "tools[0].name"),
        ({"tools": [tool("a b")]}, "tools", "tools[0].name"),
        ({"tools": [tool("a"), tool("a")]}, "tools", "tools[1].name"),
        ({"tools": [tool("a", parameters=[])]}, "tools", "tools[0].parameters"),
        ({"tools": [tool("a", description=3)]}, "tools", "tools[0].description"),
        ({"tools": [tool("a", strict="yes")]}, "tools", "tools[0].strict"),
        ({"tools": [tool("a", defer_loading=True)]}, "tools[0].defer_loading", "false"),
        ({"tools": [tool("a", output_schema={"type": "object"})]}, "tools[0].output_schema", "output_schema"),
        ({"tools": [tool(f"t{i}") for i in range(129)]}, "tools", "128"),
        ({"tools": [tool("a", description="x" * 2**20)], "tool_choice": "none"}, "tools", "1048576"),
        ({"tools": [tool("a", parameters={"maximum": INFINITE})]}, "tools", "finite"),
        ({"text": {"format": {"type": "text", "more": INFINITE}}}, "text", "finite"),
        ({"tools": "add"}, "tools", "tools"),
        ({"tools": ["add"]}, "tools", "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice", "sometimes"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice", '"name": …'),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice", "allowed_tools"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "web_search"),
        ({"tool_choice": {"type": "function", "name": "sub"}}, "tool_choice", "'sub'"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format", "yaml"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "tool_choice"),
        ({"tools": [tool("a", parameters={"not": {}}, strict=True)], "tool_choice": "required"}, "tools", "not"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_tools_are_refused(server: RunningServer, fields: dict[str, Any], param: str, text: str) -> None:
    error = refused(server, **fields)
    assert error["param"] == param and text in error["message"]


DEEP = '{"a": ' * 5000 + "1" + "}" * 5000


@pytest.mark.parametrize(
    ("index", "fields", "place"),
    [
        (2, {"call_id": None}, "input[2].call_id"),
        (2, {"name": 3}, "input[2].name"),
        (2, {"arguments": {"a": 1}}, "input[2].arguments"),
        (2, {"arguments": ""}, "input[2].arguments"),
        (2, {"arguments": "[]"}, "input[2].arguments"),
        (2, {"arguments": '{"a": '}, "input[2].arguments"),
        (2, {"arguments": DEEP}, "input[2].arguments"),
        (4, {"call_id": "c3"}, "input[4].call_id"),
        (4, {"call_id": None}, "input[4].call_id"),
        (4, {"output": None}, "input[4].output"),
        (4, {"output": []}, "input[4].output"),
        (4, {"output": ["me"]}, "input[4].output[0]"),
        (4, {"output": [{"type": "input_file", "file_id": "f"}]}, "input[4].output[0].type"),
        (4, {"type": "custom_tool_call_output"}, "input[4].type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_item_is_named_by_its_path(
    server: RunningServer, index: int, fields: dict[str, Any], place: str
) -> None:
    given = [*HISTORY[:index], {**HISTORY[index], **fields}, *HISTORY[index + 1 :]]
    error = refused(server, input=given)
    assert error["param"] == place and place in error["message"]


def test_a_template_without_tools_is_an_error(start_server: ServerFactory) -> None:
    plain = start_server()
    assert "does not support tools" in refused(plain, tool_choice="required")["message"]
    assert "--tool-call-parser" in refused(plain)["message"]
    assert "does not support tool_calls" in refused(plain, input=HISTORY, tools=[])["message"]


def test_tools_are_in_the_openapi_document(server: RunningServer) -> None:
    document = httpx.get(f"{server.address}/openapi.json").json()
    schema = document["paths"]["/v1/responses"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    tools = next(form for form in schema["properties"]["tools"]["anyOf"] if form["type"] == "array")
    assert tools["items"].items() <= {"type": "object", "additionalProperties": True}.items()
    assert "tool_choice" in schema["properties"]
