"""`ToolChoice`: the tools of a request and how they may be called. `ToolCalling`: how the model calls them."""

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from mmlora.server.bodies import FieldError
from mmlora.server.openai.protocol import check_other_fields
from mmlora.server.openai.tools.formats import REQUIRED_FORMAT, ToolCallFormat, find_format
from mmlora.server.openai.tools.parser import NamedToolParser, TextParser, ToolCallParser
from mmlora.structured_outputs import ANY_OBJECT, StructuredOutputsParams
from mmlora.utils.text import shorten

MAX_TOOLS = 128
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
CALL_ID_CHARS = string.ascii_letters + string.digits
WORDS = ("none", "auto", "required")
FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
# What else a flat tool may have, if it says no more than what holds anyway.
NEUTRAL_VALUES: Mapping[str, tuple[JsonValue, ...]] = {
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
}
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ToolChoice:
    """What a request says of tools.

    Attributes:
        tools: OpenAI's, by name; none where they may not be called.
        must_call: some tool must be called.
        name: of the one that must be called.
        is_parallel: one answer may call several.
    """

    tools: Mapping[str, Mapping[str, Any]]
    must_call: bool = False
    name: str | None = None
    is_parallel: bool = True

    @property
    def is_forced(self) -> bool:
        """Whether the answer is a call, or several, and nothing else."""
        return self.must_call or self.name is not None

    @property
    def constraint(self) -> StructuredOutputsParams | None:
        """What makes a model call what it must; None where it is free."""
        if self.name is not None:
            schema = _parameters(self.tools[self.name])
            return StructuredOutputsParams(json=_lenient(schema, self.tools[self.name]), name="tools")
        if not self.must_call:
            return None
        calls = [_call_schema(name, tool, index) for index, (name, tool) in enumerate(self.tools.items())]
        limit = {} if self.is_parallel else {"maxItems": 1}
        schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **limit}
        return StructuredOutputsParams(json=_lenient(schema, *self.tools.values()), name="tools")

    def constrain(self, constraint: StructuredOutputsParams | None) -> StructuredOutputsParams | None:
        """What the answer must look like, given what another field of the request says of that.

        Raises:
            FieldError: the answer may be a call.
        """
        if constraint is not None and self.tools:
            text = f"{constraint.name} goes with tools only where tool_choice is 'none'; the answer may call a tool"
            raise FieldError(text, constraint.name)
        return constraint or self.constraint

    def new_parser(self, format: ToolCallFormat | None) -> TextParser | None:
        """What reads the calls of one answer; None where there are none.

        Args:
            format: in which the model writes calls when it is free to do so.
        """
        if self.name is not None:
            return NamedToolParser(self.name)
        if self.must_call:
            return ToolCallParser(REQUIRED_FORMAT, self.tools)
        return ToolCallParser(format, self.tools) if self.tools and format is not None else None


class ToolCalling:
    """What a choice of tools needs of the engine, and what reads the calls.

    Args:
        parser: name of the format in which the model writes tool calls, `auto` for the one that its chat template
            speaks of, None where it is not to choose by itself whether to call a tool.
        chat_template: its text.
    """

    def __init__(self, parser: str | None, chat_template: str) -> None:
        self._can_choose = parser is not None
        self._format = find_format(parser or "auto", chat_template)

    def sampling_options(self, choice: ToolChoice) -> dict[str, bool]:
        """What a free choice of tools needs: the marks of calls, which may be special tokens, in the text.

        Raises:
            FieldError: nothing is known that could read the calls.
        """
        if not choice.tools or choice.is_forced:
            return {}
        if self._format is None or not self._can_choose:
            reason = "was started without automatic tool choice"
            if self._can_choose:
                reason = "knows no parser for the tool calls of this model (--tool-call-parser names one)"
            text = f"tool_choice='auto' cannot be served: the server {reason}; allowed: none, required, or a named tool"
            raise FieldError(text, "tool_choice")
        return {"skip_special_tokens": False}

    def new_parser(self, choice: ToolChoice) -> TextParser | None:
        """What reads the calls of one answer; None where there are none."""
        return choice.new_parser(self._format)

    def new_call_id(self) -> str:
        """An id as the model's chat template takes it."""
        if self._format is not None and self._format.has_short_ids:
            return "".join(secrets.choice(CALL_ID_CHARS) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


def read_tool_choice(
    tools: Tools | None, choice: Any, is_parallel: bool | None, *, is_flat: bool = False
) -> ToolChoice:
    """Read the fields `tools`, `tool_choice` and `parallel_tool_calls` of a request.

    Args:
        tools, choice, is_parallel: the fields.
        is_flat: names and parameters stand beside the type, as in `/v1/responses`, and not in `function`.

    Raises:
        FieldError: one of them has another form, or names no tool.
    """
    by_name = _by_name(tools or [], is_flat)
    name = _chosen_name(choice, is_flat)
    if name is not None and name not in by_name:
        raise FieldError(f"tool_choice names {shorten(name)}; tools has {', '.join(by_name) or 'none'}", "tool_choice")
    if choice == "required" and not by_name:
        raise FieldError("tool_choice='required' needs tools; received none", "tool_choice")
    if choice == "none":
        by_name = {}
    return ToolChoice(by_name, choice == "required", name, is_parallel is not False)


def _by_name(tools: Tools, is_flat: bool) -> dict[str, Mapping[str, Any]]:
    if len(tools) > MAX_TOOLS:
        raise FieldError(f"tools has {len(tools)} entries; allowed are {MAX_TOOLS}", "tools")
    by_name: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools):
        function, place = _function(tool, is_flat), f"tools[{index}]{'' if is_flat else '.function'}"
        if function is None:
            form = "type 'function'" if is_flat else "type 'function' and a function"
            raise FieldError(f"tools[{index}] must have {form}; received {shorten(tool)}", "tools")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name) or name in by_name:
            raise FieldError(
                f"{place}.name={shorten(name, json.dumps)} must be up to 128 letters, digits, dots, "
                "dashes and underscores, and no other tool's",
                "tools",
            )
        if parameters is not None and not isinstance(parameters, Mapping):
            raise FieldError(f"{place}.parameters must be a JSON schema", "tools")
        by_name[name] = _nested(tool, place) if is_flat else tool
    return by_name


def _function(value: Any, is_flat: bool) -> Mapping[str, Any] | None:
    """What tells the name in a tool, or in a choice of one."""
    if not isinstance(value, Mapping) or value.get("type") != "function":
        return None
    function = value if is_flat else value.get("function")
    return function if isinstance(function, Mapping) else None


def _nested(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A flat tool as templates want it.

    Raises:
        FieldError: it has a field that would change what the model may do.
    """
    for field, kind in {"description": str, "strict": bool}.items():
        if not isinstance(tool.get(field), kind | None):
            allowed = "a string" if kind is str else "true or false"
            raise FieldError(f"{place}.{field}={shorten(tool[field], json.dumps)} must be {allowed}", "tools")
    given = {field: value for field, value in tool.items() if field != "type" and value is not None}
    others = {f"{place}.{field}": value for field, value in given.items() if field not in FUNCTION_FIELDS}
    check_other_fields(others, {f"{place}.{field}": values for field, values in NEUTRAL_VALUES.items()})
    return {"type": "function", "function": {field: given[field] for field in given if field in FUNCTION_FIELDS}}


def _chosen_name(choice: Any, is_flat: bool) -> str | None:
    """The name of the one tool that `tool_choice` asks for."""
    if choice is None or choice in WORDS:
        return None
    name = (_function(choice, is_flat) or {}).get("name")
    if not isinstance(name, str):
        form = '"name": …' if is_flat else '"function": {"name": …}'
        allowed = f'none, auto, required or {{"type": "function", {form}}}'
        raise FieldError(f"tool_choice={shorten(choice, json.dumps)} must be {allowed}", "tool_choice")
    return name


def _parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments, which are an object whatever it says."""
    return {**ANY_OBJECT, **(tool["function"].get("parameters") or {})}


def _call_schema(name: str, tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A call, in whose schema the references within a tool's own still find what they mean."""
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {**_parameters(tool), "$id": f"tool:///{index}"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _lenient(schema: Mapping[str, Any], *tools: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out keywords that constraints do not know, unless all tools are strict."""
    is_strict = all(tool["function"].get("strict") is True for tool in tools)
    return {**schema, "x-guidance": {"lenient": not is_strict}}
