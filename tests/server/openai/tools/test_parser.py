"""Tool calls in each format, with the text fed whole and in arbitrary pieces."""

from __future__ import annotations

import itertools
import json

import pytest

from mmlora.server.openai.tools.blocks import kinds_of
from mmlora.server.openai.tools.formats import FORMATS, find_format
from mmlora.server.openai.tools.parser import Piece, TextParser, ToolCallDelta, ToolCallParser

PROPERTIES = {
    "get_weather": {"city": {"type": "string"}},
    "add": {
        "a": {"type": "integer"},
        "b": {"anyOf": [{"type": "array"}, {"type": "null"}]},
        "exact": {"type": "boolean"},
    },
}
TOOLS = {
    name: {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
    for name, properties in PROPERTIES.items()
}
WEATHER, SUM = ("get_weather", {"city": 'Köln ["}\\'}), ("add", {"a": 1, "b": [2.5, None]})
XML = next(format for format in FORMATS if format.is_xml)
NO_CALLS: list[tuple[str, object]] = []


def call(name: str, arguments: object, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


def xml(name: str, **parameters: str) -> str:
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<function={name}>\n{values}</function>"


W, S = call(*WEATHER), call(*SUM)
WX, SX = xml("get_weather", city='Köln ["}\\'), xml("add", a="1", b="[2.5, null]")
CASES = [
    ("hermes", f"<tool_call>\n{W}\n</tool_call>", "", [WEATHER]),
    (
        "hermes",
        f"Let me see.\n\n<tool_call>{W}</tool_call>\n<tool_call>\n{S}\n</tool_call>\n",
        "Let me see.",
        [WEATHER, SUM],
    ),
    ("hermes", f"<tool_call>{W}</tool_call> done", "done", [WEATHER]),
    ("hermes", f"First\n\n<tool_call>{W}</tool_call> done", "Firstdone", [WEATHER]),
    ("hermes", f"<tool_call>{W}", "", [WEATHER]),
    ("hermes", "a < b, <tool, <tool_call", "a < b, <tool, <tool_call", NO_CALLS),
    ("hermes", " just text \n", " just text \n", NO_CALLS),
    ("hermes", f"<tool_call>{W[:-1]}", f"<tool_call>{W[:-1]}", NO_CALLS),
    ("hermes", f"<tool_call>no json</tool_call> <tool_call>{S}", "<tool_call>no json</tool_call>", [SUM]),
    ("hermes", f"<tool_call>{call('rm', {})}</tool_call>", f"<tool_call>{call('rm', {})}</tool_call>", NO_CALLS),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": [1]}',
        '<tool_call>{"name": "add", "arguments": [1]}',
        NO_CALLS,
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}',
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}',
        NO_CALLS,
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": 1e999}}',
        '<tool_call>{"name": "add", "arguments": {"a": 1e999}}',
        NO_CALLS,
    ),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [("add", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", {})]),
    (
        "hermes",
        '<tool_call>{"name": ["add"], "arguments": {}}',
        '<tool_call>{"name": ["add"], "arguments": {}}',
        NO_CALLS,
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}',
        '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}',
        NO_CALLS,
    ),
    ("llama3_json", call(*WEATHER, key="parameters"), "", [WEATHER]),
    ("llama3_json", f"<|python_tag|>{W}; {call(*SUM, key='parameters')}", "", [WEATHER, SUM]),
    ("llama3_json", f"\n{W}", "", [WEATHER]),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', NO_CALLS),
    ("llama3_json", f"It is {W}", f"It is {W}", NO_CALLS),
    ("llama3_json", " \n", " \n", NO_CALLS),
    ("llama3_json", json.dumps({"type": "function", "function": {"name": "add", "parameters": SUM[1]}}), "", [SUM]),
    ("mistral", f"[TOOL_CALLS] [{W}, {S}]", "", [WEATHER, SUM]),
    (
        "mistral",
        f'Well. [TOOL_CALLS]get_weather[ARGS]{json.dumps(WEATHER[1])}[TOOL_CALLS]add{{"a": 1, "b": [2.5, null]}}',
        "Well.",
        [WEATHER, SUM],
    ),
    ("mistral", '[TOOL_CALLS]add[CALL_ID]a1b2c3d4e[ARGS]{"a": 1}', "", [("add", {"a": 1})]),
    ("mistral", "[TOOL_CALLS] and so on", "[TOOL_CALLS] and so on", NO_CALLS),
    ("granite", f"<|tool_call|>[{W}, {S}]", "", [WEATHER, SUM]),
    ("granite", f"<tool_call>[{W}]", "", [WEATHER]),
    ("granite", f"<|tool_call|>[{W}, 5]", f"<|tool_call|>[{W}, 5]", NO_CALLS),
    ("granite", "<|tool_call|>[]", "<|tool_call|>[]", NO_CALLS),
    ("phi4_mini_json", f"<|tool_call|>[{W}, {S}]<|/tool_call|>", "", [WEATHER, SUM]),
    ("phi4_mini_json", f"functools[{W}]", "", [WEATHER]),
    (
        "phi4_mini_json",
        "use functools.partial, or functools and so",
        "use functools.partial, or functools and so",
        NO_CALLS,
    ),
    ("qwen3_coder", f"<tool_call>\n{WX}\n</tool_call>", "", [WEATHER]),
    ("qwen3_coder", f"Two.\n<tool_call>\n{WX}\n</tool_call>\n<tool_call>\n{SX}\n</tool_call>", "Two.", [WEATHER, SUM]),
    ("qwen3_coder", f"{SX}</tool_call>", "", [SUM]),
    ("qwen3_coder", f"Look: {SX} done", "Look:done", [SUM]),
    ("qwen3_coder", "<tool_call><function=add></function></tool_call>", "", [("add", {})]),
    ("qwen3_coder", xml("add", a="seven", exact="True", c="7"), "", [("add", {"a": "seven", "exact": True, "c": "7"})]),
    ("qwen3_coder", xml("get_weather", city="\n7\n\n"), "", [("get_weather", {"city": "\n7\n\n"})]),
    (
        "qwen3_coder",
        "<function=add>\n<parameter=a>\n1\n<parameter=c d>\r\nx\r\n</parameter><parameter=e>y</function>",
        "",
        [("add", {"a": 1, "c d": "x", "e": "y"})],
    ),
    ("qwen3_coder", xml("add", a="1e999"), "", [("add", {"a": "1e999"})]),
    ("qwen3_coder", f"<tool_call>{' ' * 250}{SX}", "<tool_call>", [SUM]),
    ("qwen3_coder", xml("rm", path="/"), xml("rm", path="/"), NO_CALLS),
    ("qwen3_coder", SX[:-1], SX[:-1], NO_CALLS),
    ("qwen3_coder", "<function=add>a = 1</function>", "<function=add>a = 1</function>", NO_CALLS),
    ("qwen3_coder", f"<tool_call>{W}</tool_call>", f"<tool_call>{W}</tool_call>", NO_CALLS),
    ("qwen3_coder", "a <b> <tool_call> <func> c", "a <b> <tool_call> <func> c", NO_CALLS),
]


def fold(pieces: list[Piece]) -> tuple[str, list[tuple[str, object]]]:
    """Join pieces to content and calls, as the client of a stream does."""
    content, calls = "", dict[int, tuple[str, str]]()
    for piece in pieces:
        if isinstance(piece, str):
            assert piece
            content += piece
        elif piece.name is not None:
            assert piece.index == len(calls)
            calls[piece.index] = (piece.name, piece.arguments)
        else:
            name, arguments = calls[piece.index]
            calls[piece.index] = (name, arguments + piece.arguments)
    return content, [(name, json.loads(arguments)) for name, arguments in calls.values()]


def parse(parser: TextParser, *parts: str) -> tuple[str, list[tuple[str, object]]]:
    pieces = [piece for part in parts for piece in parser.feed(part)]
    return fold([*pieces, *parser.finish()])


def new_parser(name: str) -> ToolCallParser:
    format = find_format(name, "")
    assert format is not None
    return ToolCallParser(format, TOOLS)


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls_are_found_for_every_split_of_the_text(
    name: str, text: str, content: str, calls: list[tuple[str, object]]
) -> None:
    expected = content, calls
    assert parse(new_parser(name), text) == expected
    assert parse(new_parser(name), *text) == expected
    for cut in range(1, len(text)):
        assert parse(new_parser(name), text[:cut], text[cut:]) == expected
    for first, second in itertools.combinations(range(1, len(text), 3), 2):
        assert parse(new_parser(name), text[:first], text[first:second], text[second:]) == expected


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("phi4_mini_json", f"Two.<|tool_call|>[{W}, {S}]<|/tool_call|> done", "Two.done", [WEATHER, SUM]),
        ("phi4_mini_json", "a<|/tool_call|>b <|tool_call|>no<|tool_call|>", "ab no", NO_CALLS),
        ("phi4_mini_json", f"<|tool_call|>[{W[:-1]}", f"[{W[:-1]}", NO_CALLS),
        ("phi4_mini_json", f"<|tool_call|>{call('rm', {})}<|/tool_call|>", call("rm", {}), NO_CALLS),
        ("phi4_mini_json", "<|tool_call", "<|tool_call", NO_CALLS),
        (
            "phi4_mini_json",
            '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "<|tool_call|>x<|/tool_call|>"}}]',
            "",
            [("get_weather", {"city": "x"})],
        ),
        ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{json.dumps(WEATHER[1])}[ARGS] so", "so", [WEATHER]),
        ("mistral", "[TOOL_CALLS] and [CALL_ID] so on", "and  so on", NO_CALLS),
        ("llama3_json", f"<|python_tag|>print() {W}", f"print() {W}", NO_CALLS),
        ("llama3_json", f"<|python_tag|>{W}; {S}", "", [WEATHER, SUM]),
    ],
)
def test_hidden_markers_are_not_content(name: str, text: str, content: str, calls: list[tuple[str, object]]) -> None:
    format = find_format(name, "")
    assert format is not None
    for size in (len(text), 1, 2, 3, 7, 20):
        parts = [text[start : start + size] for start in range(0, len(text), size)]
        found, found_calls = parse(ToolCallParser(format, TOOLS, format.marks), *parts)
        assert (found.strip(), found_calls) == (content, calls)
        assert not any(mark in found for mark in format.marks)


def test_content_is_streamed_and_a_call_is_returned_when_complete() -> None:
    parser = new_parser("hermes")
    assert parser.feed("I look. <tool") == ["I look."]
    assert parser.feed(f"_call>{S[:-1]}") == []
    assert parser.feed("}") == [ToolCallDelta(0, json.dumps(SUM[1]), "add", is_last=True)]
    assert parser.feed("</tool_") == [] and parser.feed("call>") == [] and parser.finish() == []


def test_long_and_deep_arguments_take_linear_time() -> None:
    """Ten thousand deltas: a parser that restarts at each would take minutes."""
    parser = new_parser("hermes")
    parts = ['<tool_call>{"name": "add", "arguments": {"a": "', *["long \\\\ text "] * 10_000, '"}}']
    assert parse(parser, *parts)[1] == [("add", {"a": "long \\ text " * 10_000})]
    deep = "<tool_call>" + "[" * 100_000 + "]" * 100_000
    assert parse(new_parser("hermes"), deep) == (deep, [])


@pytest.mark.parametrize("parameters", [None, {}, {"properties": ["a"]}, {"properties": {"a": True}}], ids=str)
def test_xml_values_without_a_schema_are_text(parameters: object) -> None:
    parser = ToolCallParser(XML, {"add": {"type": "function", "function": {"name": "add", "parameters": parameters}}})
    assert parse(parser, xml("add", a="1")) == ("", [("add", {"a": "1"})])


def test_text_that_only_looks_like_calls_takes_linear_time() -> None:
    """Each block reaches from its marker to the end: reading all of them to the end would take minutes."""
    for name, text in (
        ("hermes", '<tool_call>{"' * 40_000),
        ("hermes", "<tool_call>{" * 20_000 + "}" * 20_000),
        ("qwen3_coder", "<function=" * 40_000),
    ):
        assert parse(new_parser(name), text) == (text, [])


@pytest.mark.parametrize("blank", [" ", "\n", "\r\n", "<parameter", "</param"], ids=repr)
def test_a_long_value_takes_linear_time(blank: str) -> None:
    value = blank * 200_000 + "x"
    assert parse(new_parser("qwen3_coder"), xml("get_weather", city=value)) == ("", [("get_weather", {"city": value})])


def test_a_schema_of_many_alternatives_takes_bounded_time() -> None:
    """Each alternative refers to all others: following every reference would take years."""
    root = {"$defs": {"loop": {"anyOf": [{"$ref": "#/$defs/loop"}] * 50}}}
    assert kinds_of({"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "integer"}]}, root) == {"integer"}


VALUES = [
    ({"type": "string"}, "1", "1"),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": ["string"]}, "null", "null"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "12345", "12345"),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "12345", 12345),
    ({"oneOf": [{"type": "boolean"}, {"type": "null"}]}, "True", True),
    ({"allOf": [{"$ref": "#/$defs/name"}]}, "[1]", "[1]"),
    ({"$ref": "#/$defs/list"}, "[1]", [1]),
    ({"$ref": "#/$defs/loop"}, "[1]", "[1]"),
    ({"$ref": "other.json"}, "1", "1"),
    ({"$ref": 5}, "1", "1"),
    ({"enum": ["1", "2"]}, "1", "1"),
    ({"enum": [1, 2]}, "1", 1),
    ({"const": 1}, "1", 1),
    ({"type": "number"}, "1", 1),
    ({"type": "number"}, "1.5", 1.5),
    ({"type": "integer"}, "1.5", "1.5"),
    ({"type": "object"}, '{"a": "\\ud800"}', '{"a": "\\ud800"}'),
    ({"type": 7}, "1", "1"),
    ({}, "1", "1"),
    (True, "1", "1"),
]


@pytest.mark.parametrize(("schema", "text", "value"), VALUES)
def test_xml_values_have_the_types_of_their_schemas(schema: object, text: str, value: object) -> None:
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}]}
    definitions = {"name": {"type": "string"}, "list": {"type": "array"}, "loop": loop}
    tool = {"name": "add", "parameters": {"properties": {"a": schema}, "$defs": definitions}}
    parser = ToolCallParser(XML, {"add": {"type": "function", "function": tool}})
    assert parse(parser, xml("add", a=text)) == ("", [("add", {"a": value})])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("<tool_call>\n<function=name>", None),
        ("<tool_call>\n<function=name>\n<parameter=name>", "qwen3_coder"),
        ("<seed:tool_call>\n<function=name>\n<parameter=name>", None),
        ("'[TOOL_CALLS]' + name", "mistral"),
        ("'<|tool|>' + message['tools'] + '<|/tool|>'", "phi4_mini_json"),
        ("write <|tool_call|> followed by a JSON list", "granite"),
        ("<|python_tag|>", "llama3_json"),
        ("{{ message.content }}", None),
        ("", None),
    ],
)
def test_the_format_is_detected_from_the_template(template: str, name: str | None) -> None:
    found = find_format("auto", template)
    assert (found.name if found else None) == name


def test_a_named_format_wins_over_the_template() -> None:
    assert all(find_format(format.name, "<tool_call>") is format for format in FORMATS)
