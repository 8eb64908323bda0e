"""Tools in a conversation: how they and the calls of earlier turns reach the chat template.

Templates take tools in a variable of their own, and calls as a field of the assistant's message. Phi-4's takes tools as
text in the system message, and calls as text.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmlora.errors import RequestError
from mmlora.utils.text import shorten

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
Turns = list[tuple[Message, list[Any]]]  # messages with their parts
Render = Callable[[Turns, Tools | None], str]
PHI4_MARKS = "<|tool_call|>", "<|/tool_call|>"


def with_read_calls(message: Message, name: str) -> Message:
    """A message as templates want it: the arguments of its calls as mappings, empty fields left out.

    Args:
        message: with OpenAI's `tool_calls`, or without.
        name: what errors call it.

    Raises:
        RequestError: the calls have another form.
    """
    calls = message.get("tool_calls")
    message = {field: value for field, value in message.items() if field != "tool_calls"}
    if calls in (None, []):
        return message
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{name}.tool_calls is a {type(calls).__name__}; it must be a list of calls")
    return {**message, "tool_calls": [_read_call(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]}


def _read_call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{name} must have a function with a name and arguments")
    arguments = function.get("arguments") or {}
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, Mapping):
        shown = shorten(function["arguments"])
        raise RequestError(f"{name}.function.arguments is {shown}; it must be a JSON object, as text")
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def render_with_tools(turns: Turns, tools: Tools | None, render: Render, *, knows_phi4_marks: bool) -> str:
    """Render a conversation so that the model is told of tools and calls.

    Args:
        turns: with calls as `with_read_calls` leaves them.
        tools: OpenAI's; None or empty for none.
        render: applies the chat template.
        knows_phi4_marks: the tokenizer has Phi-4's marks of calls.

    Raises:
        RequestError: the template leaves out tools or calls.
    """
    tools = tools or None
    text = render(turns, tools)
    bare = [(_without_calls(message), parts) for message, parts in turns]
    if any("tool_calls" in message for message, _ in turns) and _renders_to(text, bare, tools, render):
        if not knows_phi4_marks:
            raise RequestError(
                "the chat template of this model leaves out tool_calls, so it cannot take these messages"
            )
        turns = [(_without_calls(message), [*parts, *_spelled_calls(message)]) for message, parts in turns]
        text = render(turns, tools)
    if tools is None or not _renders_to(text, turns, None, render):
        return text
    told = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    text = render(_told_in_system_message(turns, told), None)
    if told not in text:
        raise RequestError(
            "the chat template of this model takes no tools; send none, or start with another chat_template"
        )
    return text


def _renders_to(text: str, turns: Turns, tools: Tools | None, render: Render) -> bool:
    """Whether turns come out as this text; a template may fail on what it asks for and does not get."""
    try:
        return render(turns, tools) == text
    except RequestError:
        return False


def _without_calls(message: Message) -> Message:
    return {field: value for field, value in message.items() if field != "tool_calls"}


def _spelled_calls(message: Message) -> list[str]:
    if "tool_calls" not in message:
        return []
    calls = [
        {"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in message["tool_calls"]
    ]
    start, end = PHI4_MARKS
    return [f"{start}{json.dumps(calls, ensure_ascii=False)}{end}"]


def _told_in_system_message(turns: Turns, told: str) -> Turns:
    if turns[0][0]["role"] != "system":
        return [({"role": "system", "content": "", "tools": told}, [""]), *turns]
    message, parts = turns[0]
    return [({**message, "tools": told}, parts), *turns[1:]]


def check_tools(tools: Any) -> None:
    """Refuse tools that no template could write.

    Raises:
        RequestError: naming the first of them.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise RequestError(f"tools is a {type(tools).__name__}; it must be a list of tools")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"tools[{index}] must have type 'function', and a function with a name")
