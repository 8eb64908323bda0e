"""Reasoning, content and calls in generated text, fed whole and in pieces; constraints that start after reasoning."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from mmlora.engine.detokenizer import Detokenizer
from mmlora.server.openai.reasoning import FORMATS, THINK, OutputParser, find_marks
from mmlora.server.openai.responses.items import OutputItems
from mmlora.server.openai.tools.choice import find_special_tokens
from mmlora.server.openai.tools.forced import RequiredToolParser
from mmlora.server.openai.tools.formats import find_format
from mmlora.server.openai.tools.parser import Piece, ReasoningDelta, ToolCallParser, join_calls
from mmlora.structured_outputs import ReasoningMarks, StructuredOutputsParams, added_tokens
from tests.checkpoints import build_tokenizer
from tests.server.openai.tools.definitions import ADD_CALL, CALL, generate, new_tokenizer

CASES = [
    ("<think>\n Why <b>?\n\nSo. \n</think>\n\nYes. \n", False, "Why <b>?\n\nSo.", "Yes. \n"),
    ("Why?</think>Yes.", True, "Why?", "Yes."),
    ("<think>Why?</think>Yes.", True, "Why?", "Yes."),
    ("Why?", True, "Why?", ""),
    ("Why? </thin", True, "Why? </thin", ""),
    ("<think> Why?\n", False, "Why?", ""),
    ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
    ("</think>\nYes.", True, "", "Yes."),
    ("<think></think>", False, "", ""),
    ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
    ("\n <thin air", False, "", "\n <thin air"),
    (" Yes. <think>no</think>", False, "", " Yes. <think>no</think>"),
    ("<thi", False, "", "<thi"),
    ("", False, "", ""),
    ("", True, "", ""),
]


@pytest.mark.parametrize("sizes", [[15], [9, 6], [1] * 15, [7, 1, 7], [13, 2]])
def test_log_probabilities_follow_the_reasoning(sizes: list[int]) -> None:
    form: Any = SimpleNamespace(new_parser=lambda prompt: OutputParser(THINK))
    items, tokens, start = OutputItems(form), ["<think>", *"Why", "</think>", *"Yes. No it"], 0
    for size in sizes:
        delta = SimpleNamespace(text="".join(tokens[start : start + size]), token_ids=[0] * size)
        output: Any = SimpleNamespace(outputs=[delta], prompt="")
        items.feed(output, [{"token": token} for token in tokens[start : start + size]])
        start += size
    items.finish("completed")
    reasoning, message = items.content("completed")
    assert reasoning["content"][0]["text"] == "Why"
    assert [entry["token"] for entry in message["content"][0]["logprobs"]] == tokens[5:]


def join(pieces: list[Piece]) -> tuple[str, str]:
    """Return reasoning and content; each comes once."""
    kinds = [type(piece) for piece in pieces]
    assert kinds == sorted(kinds, key=lambda kind: kind is str)
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningDelta))
    return reasoning, "".join(piece for piece in pieces if isinstance(piece, str))


def parse(parser: OutputParser, *parts: str) -> list[Piece]:
    return [piece for part in parts for piece in parser.feed(part, len(part))] + parser.finish()


@pytest.mark.parametrize(("text", "is_open", "reasoning", "content"), CASES)
def test_reasoning_is_found_for_every_split_of_the_text(text: str, is_open: bool, reasoning: str, content: str) -> None:
    def parsed(*parts: str) -> tuple[str, str]:
        return join(parse(OutputParser(THINK, is_open=is_open), *parts))

    assert parsed(text) == parsed(*text) == (reasoning, content)
    for cut in range(1, len(text)):
        assert parsed(text[:cut], text[cut:]) == (reasoning, content)
    assert join(parse(OutputParser(None), *text)) == ("", text)


def test_reasoning_is_streamed() -> None:
    parser = OutputParser(THINK)
    assert parser.feed("<think>\n") == [] and parser.feed("Why ") == [ReasoningDelta("Why")]
    assert parser.feed("so? </th") == [ReasoningDelta(" so?")]
    assert parser.feed("ink>\n") == [] and parser.feed("\nYes") == ["Yes"] and parser.feed(" \n") == [" \n"]


def test_tokens_of_the_reasoning_are_counted() -> None:
    for text, is_open, length in (("<think>Why?</think>So.", False, 19), ("Why?</think>So.", True, 12)):
        parser = OutputParser(THINK, is_open=is_open)
        parse(parser, *text)
        assert parser.num_reasoning_tokens == length
    for text in ("<thin", "Yes.", "<thin air", ""):
        parser = OutputParser(THINK)
        parse(parser, *text)
        assert parser.num_reasoning_tokens == 0


def test_calls_are_found_after_reasoning_only() -> None:
    tools: Any = {"add": {"type": "function", "function": {"name": "add"}}}
    hermes = find_format("hermes", "")
    assert hermes is not None
    text = f"<think>{CALL}</think>Wait.{CALL}"
    for parts in ([text], [*text]):
        pieces = parse(OutputParser(THINK, content=ToolCallParser(hermes, tools)), *parts)
        assert pieces[0] == ReasoningDelta(CALL) or len(parts) > 1
        assert [call.name for call in join_calls(pieces)] == ["add"]
    for text, calls in ((f"a</think>[{ADD_CALL}]", ["add"]), ("a</think>[{", [""]), ("a", [])):
        parser = OutputParser(THINK, is_open=True, content=RequiredToolParser(["add", "who"]))
        assert [call.name for call in join_calls(parse(parser, *text))] == calls


def test_markers_that_are_special_tokens_are_hidden() -> None:
    marks = FORMATS["mistral"]
    tokenizer = new_tokenizer([marks.start, marks.end])
    special = find_special_tokens(added_tokens(tokenizer), (marks.start, marks.end))
    assert len(special) == 2
    detokenizer = Detokenizer(tokenizer, [], kept_token_ids=special.values())
    for token in tokenizer("[THINK]Why?<|system|>[/THINK]Yes[/THINK].").input_ids:
        detokenizer.append(token)
    parser = OutputParser(marks, hidden=special)
    assert join(parse(parser, detokenizer.text)) == ("Why?", "Yes.")


@pytest.mark.parametrize(
    ("name", "template", "marks"),
    [
        ("auto", "{{ '<think>' + message.reasoning_content + '</think>' }}", THINK),
        ("auto", "[THINK]{{ part.thinking }}[/THINK]", FORMATS["mistral"]),
        ("auto", "{{ message.content }}", None),
        ("auto", "", None),
        ("none", "<think></think>", None),
        ("deepseek_r1", "", ReasoningMarks("<think>", "</think>", starts_open=True)),
    ],
)
def test_the_format_is_named_or_detected_from_the_template(
    name: str, template: str, marks: ReasoningMarks | None
) -> None:
    assert find_marks(name, template) == marks


def test_a_prompt_may_open_or_close_the_reasoning() -> None:
    assert THINK.is_open("<|assistant|><think>\n") and THINK.is_open("<think>")
    assert not THINK.is_open("<|user|>What is <think>?<|assistant|>") and not THINK.is_open("")
    always = FORMATS["deepseek_r1"]
    assert always.is_open("<|assistant|>") and not always.is_open("<think>\n\n</think>\n\n")


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize("kind", ["text", "special", "added"])
@pytest.mark.parametrize("constraint", [{"json": SCHEMA}, {"regex": "x{2}"}, {"grammar": 'start: "x" "x"'}], ids=str)
def test_a_constraint_starts_after_the_reasoning(kind: str, constraint: dict[str, Any]) -> None:
    """Random tokens: the reasoning is any text, and what follows it is as if there was none."""
    marks = [THINK.start, THINK.end]
    tokenizer = build_tokenizer() if kind == "text" else new_tokenizer(*([marks] if kind == "special" else [[], marks]))
    params = StructuredOutputsParams(**constraint, reasoning=THINK)
    closed = "<|assistant|><think>\n\n</think>\n\n"
    contents = {tokenizer.decode(generate(tokenizer, params, seed, closed)) for seed in range(12)}
    assert not any("think" in content or content.startswith("<") for content in contents)
    found = set()
    for prompt, is_open in (("<|assistant|>", False), ("<|assistant|><think>\n", True)):
        for seed in range(12):
            tokens = generate(tokenizer, params, seed, prompt, end="</think>")
            text = tokenizer.decode(tokens, skip_special_tokens=False)
            reasoning, content = join(parse(OutputParser(THINK, is_open=is_open), text))
            assert content == "xx" if "json" not in constraint else json.loads(content) in ({"a": True}, {"a": False})
            found.add((is_open, bool(reasoning)))
    assert found >= {(False, False), (False, True), (True, True)}
