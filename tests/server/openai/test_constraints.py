"""`response_format` and `structured_outputs` in chats and completions, with the `openai` client."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.server.conftest import RunningServer, ServerFactory

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "who": {"enum": ["me", "you"]}},
    "required": ["n", "who"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
ROUTES = ["chat/completions", "completions"]


@pytest.fixture(scope="module")
def server(start_server: ServerFactory) -> RunningServer:
    return start_server()


def body_of(route: str) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "go"}]} if route == "chat/completions" else {"prompt": "go"}
    return {"model": "tiny", "temperature": 3, "max_tokens": 150, **prompt}


def texts(server: RunningServer, route: str, **fields: Any) -> list[tuple[str, str]]:
    """Return text and finish reason of each choice, and check that a stream has the same."""
    with server.client as client:
        service: Any = client.chat.completions if route == "chat/completions" else client.completions
        request = {**body_of(route), "n": 3, "seed": 4, "max_tokens": fields.pop("max_tokens", 150)}
        whole = [
            (c.message.content if "chat" in route else c.text, c.finish_reason)
            for c in service.create(**request, extra_body=fields).choices
        ]
        streamed, reasons = [""] * 3, [""] * 3
        for chunk in service.create(**request, extra_body=fields, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += (choice.delta.content if "chat" in route else choice.text) or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert whole == list(zip(streamed, reasons, strict=True))
    return whole


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": JSON_SCHEMA},
        {"structured_outputs": {"json": SCHEMA, "regex": None}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    ],
    ids=["response_format", "structured_outputs", "text"],
)
def test_a_schema_is_followed(server: RunningServer, route: str, fields: dict[str, Any]) -> None:
    whole = [text for text, reason in texts(server, route, max_tokens=80, **fields) if reason == "stop"]
    assert whole
    for text in whole:
        Draft202012Validator(SCHEMA).validate(json.loads(text))


@pytest.mark.parametrize("route", ROUTES)
def test_the_other_constraints_are_followed(server: RunningServer, route: str) -> None:
    regex = texts(server, route, structured_outputs={"regex": "[ab]{3}c?"})
    assert all(re.fullmatch("[ab]{3}c?", text) for text, _ in regex)
    choice = texts(server, route, structured_outputs={"choice": ["left", "right"]})
    assert {text for text, _ in choice} <= {"left", "right"}
    for grammar in ('root ::= "x" "y"*', 'start: "x" "y"*'):
        found = texts(server, route, structured_outputs={"grammar": grammar})
        assert all(re.fullmatch("xy*", text) for text, _ in found)
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        for text, reason in texts(server, route, max_tokens=30, **fields):
            assert isinstance(json.loads(text), dict) if reason == "stop" else text.startswith("{")


@pytest.mark.parametrize("route", ROUTES)
def test_null_and_text_are_no_constraint(server: RunningServer, route: str) -> None:
    for fields in ({"response_format": {"type": "text"}}, {"guided_json": None, "structured_outputs": None}):
        assert texts(server, route, max_tokens=9, **fields) == texts(server, route, max_tokens=9)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format", "json_schema"),
        ({"response_format": {}}, "response_format", "null"),
        ({"response_format": "json"}, "response_format", "an object"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format", "schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "banana"}}}},
            "response_format",
            "banana",
        ),
        (
            {"response_format": JSON_SCHEMA, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "response_format and structured_outputs",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"yaml": "a"}}, "structured_outputs", "'yaml'"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex and choice"),
        ({"structured_outputs": {"name": "a"}}, "structured_outputs", "'name'"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "at least one"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs", "choice must be a list"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs", 'unknown name: "x"'),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "not valid JSON"),
        ({"structured_outputs": {"json": {"multipleOf": 1_000_003}}}, "structured_outputs", "multipleOf"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_invalid_constraint_is_named(
    server: RunningServer, route: str, fields: dict[str, Any], param: str, text: str
) -> None:
    response = httpx.post(f"{server.address}/v1/{route}", json={**body_of(route), **fields}, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert text in error["message"]
