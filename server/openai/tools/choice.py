"""`ToolChoice`: the tools of a request and how they may be called. `ToolCalling`: how the model calls them."""

import functools
import json
import re
import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from mmlora.errors import RequestError
from mmlora.server.openai.protocol import check_other_fields
from mmlora.server.openai.tools.forced import NamedToolParser, RequiredToolParser
from mmlora.server.openai.tools.formats import find_format
from mmlora.server.openai.tools.grammar import call_list, calls_or_answer, lenient, parameters_of
from mmlora.server.openai.tools.parser import TextParser, ToolCallParser
from mmlora.structured_outputs import StructuredOutputsParams, added_tokens, token_or_text
from mmlora.utils.text import shorten

MAX_TOOLS = 128
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
CALL_ID_CHARS = string.ascii_letters + string.digits
WORDS = ("none", "auto", "required")
FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
# Other fields of a flat tool, with their values that have no effect.
NEUTRAL_VALUES: Mapping[str, tuple[JsonValue, ...]] = {
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
}
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ToolChoice:
    """The tools of a request and how the model may call them.

    Attributes:
        tools: OpenAI tools by name; empty if none may be called.
        must_call: at least one tool must be called.
        name: name of the tool that must be called.
        is_parallel: several calls are allowed in one choice.
    """

    tools: Mapping[str, Mapping[str, Any]]
    must_call: bool = False
    name: str | None = None
    is_parallel: bool = True

    @property
    def is_forced(self) -> bool:
        """Whether the output must consist of tool calls only."""
        return self.must_call or self.name is not None

    @property
    def constraint(self) -> StructuredOutputsParams | None:
        """The constraint that forces the required call; None for a free choice."""
        if self.name is not None:
            tool = self.tools[self.name]
            return StructuredOutputsParams(json=lenient(parameters_of(tool), tool), name="tools")
        return call_list(self.tools, is_parallel=self.is_parallel) if self.must_call else None


class ToolCalling:
    """How the model calls tools, for all endpoints with tools.

    Args:
        parser: name of the model's tool call format; `auto` to detect it from the chat template; None to disable
            automatic tool choice.
        chat_template: Jinja source of the chat template.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, parser: str | None, chat_template: str, tokenizer: Any) -> None:
        self._can_choose = parser is not None
        self._added_tokens = added_tokens(tokenizer)
        self._format = find_format(parser or "auto", chat_template)
        self._special_marks = find_special_tokens(
            self._added_tokens, self._format.marks if self._format is not None else ()
        )

    def sampling_options(self, choice: ToolChoice, answer: StructuredOutputsParams | None) -> dict[str, Any]:
        """Return the sampling options for a tool choice.

        For a free choice, markers that are special tokens stay in the text.

        Args:
            choice: the tools and how they may be called.
            answer: the constraint of an output without calls.

        Raises:
            RequestError: a free choice is disabled, or the format is unknown, or the constraint cannot be combined
                with tools.
        """
        if not choice.tools:
            return {"structured_outputs": answer}
        if answer is not None and answer.name == "structured_outputs":
            text = "structured_outputs cannot be combined with tools unless tool_choice is 'none'; use a JSON schema"
            raise RequestError(f"{text} as the format of the response", answer.name)
        if choice.is_forced:
            return {"structured_outputs": choice.constraint}
        if self._format is None or not self._can_choose:
            reason = "was started without automatic tool choice"
            if self._can_choose:
                reason = "has no parser for the tool calls of this model (--tool-call-parser names one)"
            text = f"tool_choice='auto' cannot be served: the server {reason}; allowed: none, required, or a named tool"
            raise RequestError(text, "tool_choice")
        kept = {"kept_special_token_ids": sorted(self._special_marks.values())}
        if answer is None:
            return kept
        mark = functools.partial(token_or_text, self._added_tokens)
        combined = calls_or_answer(self._format, choice.tools, answer, mark, is_parallel=choice.is_parallel)
        return {**kept, "structured_outputs": combined}

    def new_parser(
        self, choice: ToolChoice, *, skips_special_tokens: bool = True, is_exclusive: bool = False
    ) -> TextParser | None:
        """Return a parser of the calls of one choice; None if there can be none.

        Args:
            choice: the tools that may be called.
            skips_special_tokens: remove markers that are special tokens from the content.
            is_exclusive: the output has either calls or content.
        """
        if choice.name is not None:
            return NamedToolParser(choice.name)
        if choice.must_call:
            return RequiredToolParser(choice.tools)
        if not choice.tools or self._format is None:
            return None
        hidden = self._special_marks if skips_special_tokens else ()
        return ToolCallParser(self._format, choice.tools, hidden, is_exclusive=is_exclusive)

    def new_call_id(self) -> str:
        """Return a new call id in the form that the model's chat template requires."""
        if self._format is not None and self._format.has_short_ids:
            return "".join(secrets.choice(CALL_ID_CHARS) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


def find_special_tokens(added: Mapping[str, tuple[int, bool]], texts: Iterable[str]) -> dict[str, int]:
    """Return the ids of those texts that are special tokens, which decoded text usually lacks.

    Args:
        added: see `added_tokens`.
        texts: markers.
    """
    return {text: added[text][0] for text in texts if text in added and added[text][1]}


def read_tool_choice(
    tools: Tools | None, choice: Any, is_parallel: bool | None, *, is_flat: bool = False
) -> ToolChoice:
    """Validate the fields `tools`, `tool_choice` and `parallel_tool_calls` of a request.

    Args:
        tools, choice, is_parallel: the fields.
        is_flat: tools have name and parameters at the top level, as in `/v1/responses`, not under `function`.

    Raises:
        RequestError: a field is malformed, or `tool_choice` names an unknown tool.
    """
    by_name = _by_name(tools or [], is_flat)
    name = _chosen_name(choice, is_flat)
    if name is not None and name not in by_name:
        raise RequestError(
            f"tool_choice names {shorten(name)}; tools has {', '.join(by_name) or 'none'}", "tool_choice"
        )
    if choice == "required" and not by_name:
        raise RequestError("tool_choice='required' needs tools; received none", "tool_choice")
    if choice == "none":
        by_name = {}
    return ToolChoice(by_name, choice == "required", name, is_parallel is not False)


def _by_name(tools: Tools, is_flat: bool) -> dict[str, Mapping[str, Any]]:
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} entries; the limit is {MAX_TOOLS}", "tools")
    by_name: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools):
        function, place = _function(tool, is_flat), f"tools[{index}]{'' if is_flat else '.function'}"
        if function is None:
            form = "type 'function'" if is_flat else "type 'function' and a function"
            raise RequestError(f"tools[{index}] must have {form}; received {shorten(tool)}", "tools")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name) or name in by_name:
            raise RequestError(
                f"{place}.name={shorten(name, json.dumps)} must be up to 128 letters, digits, dots, "
                "dashes and underscores, and unique",
                "tools",
            )
        if parameters is not None and not isinstance(parameters, Mapping):
            raise RequestError(f"{place}.parameters must be a JSON schema", "tools")
        by_name[name] = _nested(tool, place) if is_flat else tool
    return by_name


def _function(value: Any, is_flat: bool) -> Mapping[str, Any] | None:
    """Return the mapping that has the name of a tool or of a tool choice."""
    if not isinstance(value, Mapping) or value.get("type") != "function":
        return None
    function = value if is_flat else value.get("function")
    return function if isinstance(function, Mapping) else None


def _nested(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a flat tool in the nested form that chat templates expect.

    Raises:
        RequestError: it has an unsupported field or value.
    """
    for field, kind in {"description": str, "strict": bool}.items():
        if not isinstance(tool.get(field), kind | None):
            allowed = "a string" if kind is str else "true or false"
            raise RequestError(f"{place}.{field}={shorten(tool[field], json.dumps)} must be {allowed}", "tools")
    given = {field: value for field, value in tool.items() if field != "type" and value is not None}
    others = {f"{place}.{field}": value for field, value in given.items() if field not in FUNCTION_FIELDS}
    check_other_fields(others, {f"{place}.{field}": values for field, values in NEUTRAL_VALUES.items()})
    return {"type": "function", "function": {field: given[field] for field in given if field in FUNCTION_FIELDS}}


def _chosen_name(choice: Any, is_flat: bool) -> str | None:
    """Return the name of the tool that `tool_choice` requires, if it names one."""
    if choice is None or choice in WORDS:
        return None
    name = (_function(choice, is_flat) or {}).get("name")
    if not isinstance(name, str):
        form = '"name": …' if is_flat else '"function": {"name": …}'
        allowed = f'none, auto, required or {{"type": "function", {form}}}'
        raise RequestError(f"tool_choice={shorten(choice, json.dumps)} must be {allowed}", "tool_choice")
    return name
