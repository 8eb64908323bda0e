"""Random tokens under the constraint "calls or an answer" are always a valid call, or a valid answer."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mmlora.engine.detokenizer import Detokenizer
from mmlora.errors import ConstraintError
from mmlora.server.openai.tools.choice import ToolCalling, find_special_tokens, read_tool_choice
from mmlora.server.openai.tools.formats import FORMATS, ToolCallFormat, find_format
from mmlora.server.openai.tools.parser import ToolCallDelta, ToolCallParser, join_calls
from mmlora.structured_outputs import ConstraintCompiler, ReasoningMarks, StructuredOutputsParams, added_tokens
from tests.checkpoints import END_ID, build_tokenizer
from tests.server.openai.tools.definitions import generate, new_tokenizer

ANSWER = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
ADD = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "to": {"$ref": "#/$defs/to"},
        "exact": {"type": "boolean"},
    },
    "required": ["a", "to"],
    "additionalProperties": False,
    "$defs": {"to": {"enum": ["x", "y z"]}},
}
TELL = {
    "type": "object",
    "properties": {"list": {"type": "array", "items": {"$ref": "#/$defs/to"}, "maxItems": 2}},
    "required": ["list"],
    "additionalProperties": False,
    "$defs": {"to": {"type": "number", "minimum": 0, "maximum": 9, "multipleOf": 1}},
}
SCHEMAS = {"add": ADD, "tell.it": TELL, "now": {"type": "object", "additionalProperties": False}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
RESPONSE_FORMAT = StructuredOutputsParams(json=ANSWER, name="response_format")
NAMES = [format.name for format in FORMATS]


def combined(tokenizer: Any, format: ToolCallFormat, *, is_parallel: bool = True, tools: Any = None) -> dict[str, Any]:
    """Return the sampling options of a free choice between tools and an answer."""
    choice = read_tool_choice(tools or TOOLS, "auto", is_parallel)
    return ToolCalling(format.name, "", tokenizer).sampling_options(choice, RESPONSE_FORMAT)


def outcome(tokenizer: Any, format: ToolCallFormat, tokens: list[int]) -> tuple[str, list[ToolCallDelta]]:
    """Return content and calls of generated tokens, read as the server does."""
    marks = find_special_tokens(added_tokens(tokenizer), format.marks)
    detokenizer = Detokenizer(tokenizer, [], kept_token_ids=marks.values())
    for token in tokens:
        detokenizer.append(token)
    detokenizer.finish()
    tools = {tool["function"]["name"]: tool for tool in TOOLS}
    parser = ToolCallParser(format, tools, marks, is_exclusive=True)  # type: ignore[arg-type]
    pieces = parser.feed(detokenizer.text) + parser.finish()
    return "".join(piece for piece in pieces if isinstance(piece, str)), join_calls(pieces)


@pytest.mark.parametrize("is_special", [True, False, None], ids=["special", "added", "text"])
@pytest.mark.parametrize("name", NAMES)
def test_an_output_is_a_valid_call_or_a_valid_answer(name: str, is_special: bool | None) -> None:
    format = next(format for format in FORMATS if format.name == name)
    marks = [mark for mark in format.marks if not mark.startswith("func")]
    tokenizer = build_tokenizer()
    if is_special is not None:
        tokenizer = new_tokenizer(marks if is_special else [], [] if is_special else marks)
    options = combined(tokenizer, format)
    assert len(options["kept_special_token_ids"]) == (len(marks) if is_special else 0)
    found: Counter[str] = Counter()
    for seed in range(60):
        content, calls = outcome(tokenizer, format, generate(tokenizer, options["structured_outputs"], seed))
        if calls:
            assert content == ""
            found["calls" if len(calls) > 1 else "call"] += 1
        else:
            Draft202012Validator(ANSWER).validate(json.loads(content))
            found["answer"] += 1
        for call in calls:
            assert call.name is not None
            found[call.name] += 1
            Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))
    assert set(found) == {"answer", "call", "calls", *SCHEMAS}


def test_calls_or_an_answer_follow_reasoning() -> None:
    format, marks = find_format("hermes", ""), ["<think>", "</think>"]
    assert format is not None
    for tokenizer in (build_tokenizer(), new_tokenizer(marks), new_tokenizer([], [*marks, *format.marks, "\n\n"])):
        params = replace(combined(tokenizer, format)["structured_outputs"], reasoning=ReasoningMarks(*marks))
        kinds = set()
        for seed in range(20):
            tokens = generate(tokenizer, params, seed, "<think>\n" if seed % 2 else "", end="</think>")
            text = tokenizer.decode(tokens, skip_special_tokens=False)
            thought, mark, rest = text.rpartition("</think>")
            content, calls = outcome(tokenizer, format, tokenizer(rest, add_special_tokens=False).input_ids)
            assert bool(calls) != bool(content.strip()) and (seed % 2 == 0 or mark)
            assert not content.strip() or Draft202012Validator(ANSWER).is_valid(json.loads(content))
            kinds |= {"call" if calls else "answer", "thought" if thought else "none"}
        assert kinds == {"call", "answer", "thought", "none"}


@pytest.mark.parametrize("name", NAMES)
def test_one_call_without_parallel_tool_calls(name: str) -> None:
    format, tokenizer = next(format for format in FORMATS if format.name == name), build_tokenizer()
    options = combined(tokenizer, format, is_parallel=False)
    for seed in range(25):
        _, calls = outcome(tokenizer, format, generate(tokenizer, options["structured_outputs"], seed))
        assert len(calls) <= 1


def test_free_text_and_unknown_parameters_in_xml() -> None:
    tokenizer = build_tokenizer()
    format = next(format for format in FORMATS if format.is_xml)
    schema = {"properties": {"text": {"type": "string"}, "any": {}}, "required": ["text"]}
    tools = [{"type": "function", "function": {"name": "add", "parameters": schema}}]
    tools.append({"type": "function", "function": {"name": "now"}})
    params = combined(tokenizer, format, tools=tools)["structured_outputs"]
    calls = [call for seed in range(40) for call in outcome(tokenizer, format, generate(tokenizer, params, seed))[1]]
    assert {call.name for call in calls} == {"add", "now"}
    assert all("text" in json.loads(call.arguments) for call in calls if call.name == "add")


def test_markers_inside_an_answer_are_text() -> None:
    format = next(format for format in FORMATS if format.is_xml)
    text = json.dumps({"a": "<tool_call><function=now></function></tool_call>"})
    tools = {"now": TOOLS[2]}
    for is_exclusive in (True, False):
        parser = ToolCallParser(format, tools, is_exclusive=is_exclusive)  # type: ignore[arg-type]
        pieces = [*parser.feed(text), *parser.finish()]
        assert ("".join(map(str, pieces)) == text) == is_exclusive


def test_keywords_that_cannot_be_enforced_are_refused_for_strict_tools_only() -> None:
    tokenizer, format = build_tokenizer(), FORMATS[-2]
    parameters = {"type": "object", "properties": {"a": {"not": {}}}}
    for strict in (False, True):
        tools = [{"type": "function", "function": {"name": "a", "parameters": parameters, "strict": strict}}]
        params = combined(tokenizer, format, tools=tools)["structured_outputs"]
        compiler = ConstraintCompiler(tokenizer, frozenset({END_ID}))
        if not strict:
            assert compiler.compile(params).error is None
            continue
        with pytest.raises(ConstraintError, match="not") as caught:
            compiler.compile(params)
        assert caught.value.param == "response_format"


def test_schemas_are_limited_in_all() -> None:
    functions = [{"name": f"a{i}", "parameters": {"enum": ["x" * 30_000]}} for i in range(5)]
    large = [{"type": "function", "function": function} for function in functions]
    with pytest.raises(ConstraintError, match="131072"):
        combined(build_tokenizer(), FORMATS[-2], tools=large)


def shared(value: Any) -> dict[str, Any]:
    """Return a schema whose many parameters refer to one schema."""
    return {"properties": {f"p{i}": {"$ref": "#/$defs/x"} for i in range(2000)}, "$defs": {"x": value}}


@pytest.mark.parametrize(
    "schema",
    [
        {**shared({"type": "integer"}), "definitions": "x" * 10**6},
        shared({"enum": ["x"] * 10**5}),
        shared({"type": ["string"] * 10**6}),
        shared({"anyOf": [{"type": "string"}] * 10**6}),
        {"properties": {f"p{i}": {} for i in range(20_000)}, "required": [f"q{i}" for i in range(20_000)]},
    ],
    ids=["definitions", "enum", "type", "anyOf", "required"],
)
def test_large_schemas_take_linear_time(schema: dict[str, Any]) -> None:
    format = next(format for format in FORMATS if format.is_xml)
    tools = [{"type": "function", "function": {"name": "a", "parameters": schema}}]
    start = time.process_time()
    with contextlib.suppress(ConstraintError):
        combined(build_tokenizer(), format, tools=tools)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("ref", ["#/nope", "#/properties/a/type", f"#/required/{'9' * 5000}"])
def test_references_without_a_schema_are_ignored_or_refused(ref: str) -> None:
    tokenizer, format = build_tokenizer(), next(format for format in FORMATS if format.is_xml)
    for kind, text in (("string", None), ("integer", "tools")):
        schema = {"properties": {"a": {"type": kind, "$ref": ref}}, "required": ["a"]}
        tools = [{"type": "function", "function": {"name": "a", "parameters": schema}}]
        params = combined(tokenizer, format, tools=tools)["structured_outputs"]
        with pytest.raises(ConstraintError) if text is not None else contextlib.nullcontext():
            ConstraintCompiler(tokenizer, frozenset({END_ID})).compile(params)
