"""Tools for the tests of chats and responses, and helpers that check calls and prompts."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from mmlora.server.openai.tools.formats import ToolCallFormat
from mmlora.structured_outputs import ConstraintCompiler, StructuredOutputsParams
from tests.checkpoints import END_ID, build_tokenizer
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


def new_tokenizer(special: list[str], added: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with more special tokens, and added tokens that are not special."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added or []])
    return tokenizer


def generate(
    tokenizer: Any, params: StructuredOutputsParams, seed: int, prompt: str = "", *, end: str = "</parameter>"
) -> list[int]:
    """Return random tokens that follow a constraint.

    Outputs are short: blanks are rare, and where any text may follow, `end` often does.
    """
    rng = random.Random(seed)
    matcher = ConstraintCompiler(tokenizer, frozenset({END_ID})).compile(params, prompt)
    blanks = {tokenizer.convert_tokens_to_ids(tokenizer.tokenize(blank)[0]) for blank in " \t\n\r"}
    closing, tokens = tokenizer(end, add_special_tokens=False).input_ids, list[int]()
    while not matcher.is_complete:
        assert matcher.error is None and len(tokens) < 3000
        allowed = [int(i) for i in np.flatnonzero(matcher.allowed(len(tokenizer), can_end=True))]
        token = rng.choice([i for i in allowed if i not in blanks or rng.random() < 0.05] or allowed)
        if token == END_ID:
            break
        is_free = closing[0] in allowed and len(allowed) > 100 and rng.random() < 0.2
        for next_token in closing if is_free else [token]:
            tokens.append(next_token)
            matcher.advance(next_token)
    return tokens
