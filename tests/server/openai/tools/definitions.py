"""Tools for the tests of chats and responses, and helpers that check calls and prompts."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from mmlora.server.openai.tools.formats import ToolCallFormat
from mmlora.structured_outputs import StructuredOutputsParams
from tests.server.conftest import RunningServer

TEMPLATE = (
    "{%- if tools -%}<|system|>{%- for tool in tools -%}{{ tool.function | tojson }}{%- endfor -%}<|end|>{%- endif -%}"
    "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content }}"
    "{%- for call in message.tool_calls or [] -%}<tool_call>{{ call.function | tojson }}</tool_call>{%- endfor -%}"
    "<|end|>{%- endfor -%}<|assistant|>"
)
ADD_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "to": {"$ref": "#/$defs/to"}},
    "required": ["a", "to"],
    "additionalProperties": False,
    "$defs": {"to": {"enum": ["x", "y"]}},
}
WHO_SCHEMA = {
    **ADD_SCHEMA,
    "properties": {"to": {"$ref": "#/$defs/to"}},
    "required": [],
    "$defs": {"to": {"const": "z"}},
}
SCHEMAS = {"add": ADD_SCHEMA, "who": WHO_SCHEMA}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "to": "x"}}\n</tool_call>'
ADD_CALL = '{"name": "add", "arguments": {"a": 1, "to": "x"}}'
MARKED = ToolCallFormat("marked", ("<|user|>",), ("<|assistant|>",), hints=("<tool_call>",))  # by special tokens
LIMITS = {"chat/completions": "max_tokens", "responses": "max_output_tokens"}


def check_calls(calls: list[dict[str, str]]) -> None:
    for call in calls:
        Draft202012Validator(SCHEMAS[call["name"]]).validate(json.loads(call["arguments"]))


def say_tokens(server: RunningServer, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Make the model generate a text, in which names such as <|user|> are special tokens."""
    ids = server.llm.tokenizer(text, add_special_tokens=False).input_ids
    grammar = StructuredOutputsParams(grammar="start: " + " ".join(f"<[{token}]>" for token in ids))
    make = server.llm.engine.default_sampling_params
    monkeypatch.setattr(
        server.llm.engine, "default_sampling_params", lambda **o: make(**{**o, "structured_outputs": grammar})
    )


def prompt_of(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], path: str = "chat/completions"
) -> str:
    """Return the prompt of a request."""
    prompts, process = [], server.llm.engine.process_input

    def record(request_id: str, prompt: Any, *args: Any) -> Any:
        ready = process(request_id, prompt, *args)
        prompts.append(ready.prompt)
        return ready

    with monkeypatch.context() as patch:
        patch.setattr(server.llm.engine, "process_input", record)
        response = httpx.post(f"{server.address}/v1/{path}", json={LIMITS[path]: 1, **body}, timeout=60)
    assert response.status_code == 200, response.text
    return str(prompts[0])
