"""`ChatPrompt`: a validated conversation in OpenAI's format; its media are not fetched or decoded yet."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mmlora.errors import RequestError
from mmlora.inputs.chat_template import ChatTemplate, Message, Tools, Turn
from mmlora.inputs.content_parts import read_part
from mmlora.processors.media.loader import PromptMedia
from mmlora.utils.text import describe_type, shorten

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
REASONING_FIELDS: Final = ("reasoning_content", "reasoning")  # one text under two names
ROLE: Final = re.compile(r"[\w.-]{1,64}")  # templates write roles between control tokens
UNSUPPORTED_FIELDS: Final = ("audio", "function_call")  # of messages: they stand for content that is not in the prompt


@dataclass(frozen=True, eq=False)
class ChatPrompt:
    """A validated conversation, which `InputProcessor.process` renders.

    Attributes:
        turns: the messages with the parts of their content: text and media references.
        media: the media of all turns; None without any.
        template: renders the turns.
        template_kwargs: variables of the template.
        tools: OpenAI tools for the template.
        mm_processor_kwargs, cache_salt: as in other prompts.
        add_special_tokens: add them to what the template renders, which usually has them.
    """

    turns: list[Turn]
    media: PromptMedia | None
    template: ChatTemplate
    template_kwargs: Mapping[str, Any]
    tools: Tools = ()
    mm_processor_kwargs: Mapping[str, Any] | None = None
    cache_salt: str | None = None
    add_special_tokens: bool = False

    def render(self) -> str:
        """Return the rendered prompt.

        Raises:
            RequestError: the template fails, or does not support tools or tool calls.
        """
        return self.template.render(self.turns, self.tools, self.template_kwargs)


def read_messages(messages: Sequence[Message], *, is_strict: bool = False) -> list[Turn]:
    """Validate messages and split their content into parts.

    Args:
        messages: each with `role` and `content`, which is a string or a list of parts: `text`, and `image_url`,
            `input_audio`, `audio_url`, `image`, `audio` and so on (see `docs/engine.md`); a media part may have a
            `uuid`. Assistant messages may have `tool_calls`.
        is_strict: require content, and refuse Python objects as media, and fields and roles that a template would
            misread. Other fields, and roles that OpenAI does not have, go to the template.

    Raises:
        RequestError: a message is malformed.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError("messages must be a list of at least one message")
    return [_read_message(message, f"messages[{index}]", is_strict) for index, message in enumerate(messages)]


def text_of(turn: Turn) -> str:
    """Return the text of a message without its media."""
    return "".join(part for part in turn[1] if isinstance(part, str))


def check_tools(tools: Any) -> None:
    """Check that tools have a function with a name.

    Raises:
        RequestError: naming the first malformed tool.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise RequestError(f"tools is {describe_type(tools)}; it must be a list of tools")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"tools[{index}] must have type 'function', and a function with a name")


def _read_message(message: Any, name: str, is_strict: bool) -> Turn:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        if is_strict and isinstance(message, Mapping):
            raise _unknown_role(message.get("role"), name)
        received = "an object without a role" if isinstance(message, Mapping) else describe_type(message)
        raise RequestError(f"{name} is {received}; it must be an object with a 'role' and 'content'")
    if is_strict:
        _check_strictly(message, name)
    content = message.get("content")
    message = _with_reasoning(_with_parsed_calls(message, name))
    if content is None or isinstance(content, str):
        return message, [content or ""]
    if not isinstance(content, Sequence):
        raise RequestError(f"{name}.content is {describe_type(content)}; it must be text or a list of parts")
    return message, [read_part(part, allows_objects=not is_strict) for part in content]


def _check_strictly(message: Message, name: str) -> None:
    role = message["role"]
    if not ROLE.fullmatch(role):
        raise _unknown_role(role, name)
    for field_name in UNSUPPORTED_FIELDS:
        if message.get(field_name):
            shown = shorten(field_name)
            raise RequestError(f"{name} has the field {shown}, which this server does not support", "messages")
    if message.get("tool_calls") and role in ROLES and role != "assistant":
        raise RequestError(f"{name} has tool_calls; only assistant messages may have them", "messages")
    if message.get("content") in (None, []) and role != "assistant":
        received = shorten(", ".join(map(repr, message)), str)
        text = f"{name}.content is missing or empty; it must be text or a list of parts; the message has {received}"
        raise RequestError(text, "messages")


def _unknown_role(role: Any, name: str) -> RequestError:
    allowed = f"{', '.join(ROLES)}, or another role of the chat template (up to 64 letters, digits, _, . and -)"
    return RequestError(f"{name}.role={shorten(role, json.dumps)} must be one of {allowed}", "messages")


def _with_parsed_calls(message: Message, name: str) -> Message:
    """Return a message as templates expect it: arguments of calls are mappings, an empty list of calls is removed.

    Raises:
        RequestError: the calls are malformed.
    """
    calls = message.get("tool_calls")
    message = {field_name: value for field_name, value in message.items() if field_name != "tool_calls"}
    if calls in (None, []):
        return message
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{name}.tool_calls is {describe_type(calls)}; it must be a list of calls")
    return {**message, "tool_calls": [_parse_call(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]}


def _with_reasoning(message: Message) -> Message:
    """Return a message whose reasoning has both names under which templates look for it."""
    texts = [message.get(name) for name in REASONING_FIELDS]
    reasoning = next((text for text in texts if isinstance(text, str)), None)
    return message if reasoning is None else {**message, **dict.fromkeys(REASONING_FIELDS, reasoning)}


def _parse_call(call: Any, name: str) -> dict[str, Any]:
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
