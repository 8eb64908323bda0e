"""Forced calls that are complete, or that end early at any place: whole, and fed in pieces."""

from __future__ import annotations

import json

import pytest

from mmlora.server.openai.tools.forced import NamedToolParser, RequiredToolParser
from mmlora.server.openai.tools.parser import TextParser, ToolCallDelta, join_calls

NAMES = ("add", "add_more", "who")
FIRST, SECOND = '{"a": "x\\\\\\"}]", "b": [{"c": {}}, 1]}', "{ }"
TEXT = f"""[ {{"name": "add_more", "arguments": {FIRST} }},
 {{ "name" : "who","arguments":{SECOND}}}]"""


def parse(parser: TextParser, *parts: str) -> list[tuple[str | None, str, bool]]:
    pieces = [piece for part in parts for piece in parser.feed(part)] + parser.finish()
    assert all(isinstance(piece, ToolCallDelta) for piece in pieces)
    calls = join_calls(pieces)
    assert [call.index for call in calls] == list(range(len(calls)))
    return [(call.name, call.arguments, call.is_last) for call in calls]


def required(*parts: str) -> list[tuple[str | None, str, bool]]:
    return parse(RequiredToolParser(NAMES), *parts)


def test_required_calls_are_found_for_every_split_of_the_text() -> None:
    assert json.loads(FIRST) == {"a": 'x\\"}]', "b": [{"c": {}}, 1]}
    expected = [("add_more", FIRST, True), ("who", SECOND, True)]
    assert required(TEXT) == required(*TEXT) == expected
    for first in range(len(TEXT)):
        for second in range(first, len(TEXT), 7):
            assert required(TEXT[:first], TEXT[first:second], TEXT[second:]) == expected


def test_an_output_that_ends_early_is_an_incomplete_call() -> None:
    """At each length the calls are those of the whole text, as far as they go, and the same in a stream."""
    for length in range(len(TEXT)):
        calls = required(TEXT[:length])
        assert calls == required(*TEXT[:length]) and calls
        for (name, arguments, is_last), whole in zip(calls, [("add_more", FIRST), ("who", SECOND)], strict=False):
            assert name is not None and whole[0].startswith(name) and whole[1].startswith(arguments)
            assert is_last == ((name, arguments) == whole)
        assert all(is_last for _, _, is_last in calls[:-1])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", ""),
        ("[", ""),
        ('[{"na', ""),
        ('[{"name": "', ""),
        ('[{"name": "a', "a"),
        ('[{"name": "add', "add"),
        ('[{"name": "add_', "add_more"),
        ('[{"name": "w', "who"),
        ('[{"name": "add", "argum', "add"),
        ('[{"name": "add", "arguments":  ', "add"),
    ],
)
def test_an_incomplete_name_is_completed_if_only_one_tool_has_it(text: str, name: str) -> None:
    assert required(text) == [(name, "", False)]
    assert parse(RequiredToolParser(["who"]), text[:8]) == [("who", "", False)]


def test_arguments_are_streamed_as_they_arrive() -> None:
    parser = RequiredToolParser(NAMES)
    assert parser.feed('[{"name": "add", "arguments"') == []
    assert parser.feed(': {"a"') == [ToolCallDelta(0, '{"a"', "add")]
    assert parser.feed(": 1") == [ToolCallDelta(0, ": 1")]
    assert parser.feed("} ") == [ToolCallDelta(0, "}", is_last=True)]
    assert parser.feed("}") == parser.feed("]") == parser.finish() == []


def test_arguments_of_any_type_end_with_their_call() -> None:
    for value in ('"a}"', "1", "null", '["}", {}]', "{}"):
        assert required(f'[{{"name": "add", "arguments": {value}\n}}]') == [("add", value, True)]


def test_long_arguments_take_linear_time() -> None:
    value = json.dumps({"a": 'long \\ "text" ' * 5000, "b": [[]] * 5000})
    assert required(*f'[{{"name": "add", "arguments": {value}}}]') == [("add", value, True)]


def test_arguments_of_a_named_tool_are_streamed() -> None:
    parser = NamedToolParser("add")
    pieces = [*parser.feed('{"a"'), *parser.feed(""), *parser.feed(": 1}"), *parser.finish()]
    assert pieces == [ToolCallDelta(0, '{"a"', "add"), ToolCallDelta(0, ": 1}")]
    assert parse(NamedToolParser("add")) == [("add", "", False)]
