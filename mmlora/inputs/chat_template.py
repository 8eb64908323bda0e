"""`ChatTemplate`: a Jinja chat template whose capabilities are detected when it is loaded."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables

from mmlora.errors import ConfigError, RequestError
from mmlora.inputs.content_parts import Part
from mmlora.utils.text import shorten

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
Turn = tuple[Message, list[Part]]  # a message, and the parts of its content

MAX_REASON_CHARS: Final = 400
RESERVED: Final = frozenset({"chat_template", "conversation", "messages", "self", "tokenize"})  # no client sets them
LIST_REPR: Final = "'type':"  # shows that a template printed a list of parts with Python's repr
GENERATION_TAG: Final = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # an extension of transformers
PHI4_CALL_MARKS: Final = "<|tool_call|>", "<|/tool_call|>"
# Contents of the conversations that detect the capabilities of a template.
_PROBE_TEXTS: Final = "quartz", "basalt", "gneiss"
_PROBE_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "feldspar",
        "description": "Look up a mineral.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}
_PROBE_CALL: Final = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "feldspar", "arguments": {"name": "mica"}},
}


def load_chat_template(template: str | None) -> str | None:
    """Return the Jinja source of a `chat_template` option, which is that source or the path of a file.

    Raises:
        ConfigError: it looks like the path of a file that does not exist or cannot be read.
    """
    if template is None or any(mark in template for mark in ("{{", "{%", "\n")):
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise ConfigError(f"chat_template={template!r} is neither a Jinja template nor a file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template={template!r} cannot be read: {error}") from None


class ChatTemplate:
    """Chat template of a model.

    Templates do not declare their capabilities. They are detected once, by rendering a few short conversations.

    Attributes:
        source: Jinja source; all sources joined if the tokenizer has several templates.
        needs_parts: content must be a list of parts; strings are not rendered.
        media_parts: modalities whose parts are rendered as placeholders. For other modalities, placeholders are
            inserted into the text content.
        has_tools, has_tool_calls: `tools`, and `tool_calls` of assistant messages, are rendered.
        variables: variables that the template reads, such as `enable_thinking`.

    Args:
        tokenizer: the model's tokenizer, which renders the template.
        placeholders: placeholder text by modality.
        template: Jinja text; by default the tokenizer's template.
    """

    def __init__(self, tokenizer: Any, placeholders: Mapping[str, str], template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._placeholders = placeholders
        self._template = template
        source = template or getattr(tokenizer, "chat_template", None) or ""
        self.source: str = source if isinstance(source, str) else "\n".join(source.values())
        self.needs_parts = False
        self.media_parts: Collection[str] = ()
        self.has_tools = self.has_tool_calls = False
        self.variables = _variables(self.source)
        if self.source:
            self._detect_capabilities()

    def render(self, turns: list[Turn], tools: Tools, kwargs: Mapping[str, Any]) -> str:
        """Render a conversation.

        Args:
            turns: the messages; arguments of `tool_calls` are mappings.
            tools: OpenAI tools; may be empty.
            kwargs: variables of the template.

        Raises:
            RequestError: the template fails, does not support tools or tool calls, or a variable is reserved.
        """
        reserved = sorted(RESERVED & kwargs.keys())
        if reserved:
            message = f"chat_template_kwargs has {', '.join(reserved)}, which templates cannot take from a request"
            raise RequestError(message, "chat_template_kwargs")
        if not self.has_tool_calls and any("tool_calls" in message for message, _ in turns):
            turns = [self._with_calls_as_text(*turn) for turn in turns]
        if not tools:
            return self._render_turns(turns, kwargs)
        if self.has_tools:
            text = self._render_turns(turns, {**kwargs, "tools": tools})
            required = [tool["function"]["name"] for tool in tools]  # a template may skip tools in some conversations
        else:  # Phi-4's template expects tools as a field of the system message
            required = [json.dumps([tool["function"] for tool in tools], ensure_ascii=False)]
            text = self._render_turns(_with_system_tools(turns, required[0]), kwargs)
        if not all(string in text for string in required):
            raise RequestError(
                "the chat template does not support tools; send none, or start the engine with another chat_template"
            )
        return text

    def _render_turns(self, turns: list[Turn], kwargs: Mapping[str, Any]) -> str:
        modalities = {part.modality for _, parts in turns for part in parts if not isinstance(part, str)}
        if not modalities:
            joined = [(message, ["".join(map(str, parts))]) for message, parts in turns]
            return self._apply([_message(turn, as_parts=self.needs_parts) for turn in joined], kwargs)
        if modalities.issubset(self.media_parts):
            text = self._try([_message(turn, as_parts=True) for turn in turns], kwargs)
            if text is not None and self._has_placeholders(text, turns):
                return text
        return self._apply([_message(self._with_placeholders(turn), as_parts=False) for turn in turns], kwargs)

    def _apply(self, messages: list[dict[str, Any]], kwargs: Mapping[str, Any]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, **kwargs
            )
        except (TemplateError, ValueError, TypeError) as error:
            reason = shorten(str(error), str, MAX_REASON_CHARS)  # some messages repeat the whole conversation
            raise RequestError(f"the chat template cannot render these messages: {reason}") from None
        return text

    def _with_placeholders(self, turn: Turn) -> Turn:
        message, parts = turn
        return message, [part if isinstance(part, str) else self._placeholders[part.modality] for part in parts]

    def _has_placeholders(self, text: str, turns: list[Turn]) -> bool:
        """Return whether the text has one placeholder per item, and no printed list of parts."""
        parts = [part for _, parts in turns for part in parts]
        written = "".join(part for part in parts if isinstance(part, str))
        for modality, placeholder in self._placeholders.items():
            num_items = sum(not isinstance(part, str) and part.modality == modality for part in parts)
            if text.count(placeholder) - written.count(placeholder) != num_items:
                return False
        return text.count(LIST_REPR) == written.count(LIST_REPR)

    def _with_calls_as_text(self, message: Message, parts: list[Part]) -> Turn:
        """Append the calls of a message to its text, in Phi-4's format.

        Raises:
            RequestError: the tokenizer does not have that format's marker.
        """
        if "tool_calls" not in message:
            return message, parts
        start, end = PHI4_CALL_MARKS
        if self._tokenizer.convert_tokens_to_ids(start) in (None, self._tokenizer.unk_token_id):
            raise RequestError(
                "the chat template does not support tool_calls; send none, or start the engine with another one"
            )
        calls = [{name: call["function"][name] for name in ("name", "arguments")} for call in message["tool_calls"]]
        text = f"{start}{json.dumps(calls, ensure_ascii=False)}{end}"
        return {field: value for field, value in message.items() if field != "tool_calls"}, [*parts, text]

    def _detect_capabilities(self) -> None:
        self.needs_parts = self._loses_strings()
        self.media_parts = frozenset(filter(self._writes_placeholder, self._placeholders))
        user, assistant = _turn("user", _PROBE_TEXTS[0]), _turn("assistant", "")
        caller: Turn = ({**assistant[0], "tool_calls": [_PROBE_CALL]}, assistant[1])
        self.has_tools = self._renders_more([user], [user], {"tools": [_PROBE_TOOL]})
        self.has_tool_calls = self._renders_more([user, assistant], [user, caller])

    def _loses_strings(self) -> bool:
        """Return whether string content is not rendered, while the same content as parts is."""
        for roles in (("user", "assistant", "user"), ("user",), ("system", "user")):
            turns = [_turn(role, text) for role, text in zip(roles, _PROBE_TEXTS, strict=False)]
            texts = _PROBE_TEXTS[: len(roles)]
            if _has_all(self._try([_message(turn, as_parts=False) for turn in turns]), texts):
                return False
            if _has_all(self._try([_message(turn, as_parts=True) for turn in turns]), texts):
                return True
        return False

    def _writes_placeholder(self, modality: str) -> bool:
        """Return whether a part of this modality is rendered as its placeholder."""
        content = [{"type": modality}, {"type": "text", "text": _PROBE_TEXTS[0]}]
        text = self._try([{"role": "user", "content": content}])
        return text is not None and text.count(self._placeholders[modality]) == 1 and LIST_REPR not in text

    def _renders_more(self, fewer: list[Turn], more: list[Turn], kwargs: Mapping[str, Any] | None = None) -> bool:
        """Return whether the template renders what `more` and `kwargs` add to `fewer`.

        Some templates fail on a conversation without a system message, others on one with it.
        """
        for before in ([], [_turn("system", _PROBE_TEXTS[1])]):
            with_more, without = (
                self._try([_message(turn, as_parts=self.needs_parts) for turn in [*before, *turns]], given)
                for turns, given in ((more, kwargs), (fewer, None))
            )
            if with_more is not None and with_more != without:
                return True
        return False

    def _try(self, messages: list[dict[str, Any]], kwargs: Mapping[str, Any] | None = None) -> str | None:
        try:
            return self._apply(messages, {"add_generation_prompt": True, **(kwargs or {})})
        except Exception:  # a template may raise anything for a conversation that it does not support
            return None


def _variables(source: str) -> frozenset[str]:
    """Return the variables that a template does not define itself; none if it cannot be parsed."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(find_undeclared_variables(environment.parse(GENERATION_TAG.sub("", source))))
    except TemplateError:
        return frozenset()


def _turn(role: str, text: str) -> Turn:
    return {"role": role}, [text]


def _message(turn: tuple[Message, Sequence[Part]], *, as_parts: bool) -> dict[str, Any]:
    """Return a turn as a message for the template, with a list of parts or one string as content."""
    message, parts = turn
    if not as_parts:
        return {**message, "content": "".join(map(str, parts))}
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": part.modality} for part in parts]
    return {**message, "content": content}


def _with_system_tools(turns: list[Turn], tools: str) -> list[Turn]:
    message, parts = turns[0]
    if message["role"] != "system":
        return [({"role": "system", "tools": tools}, [""]), *turns]
    return [({**message, "tools": tools}, parts), *turns[1:]]


def _has_all(text: str | None, contents: Iterable[str]) -> bool:
    """Return whether a rendered text has all contents, and no printed list of parts."""
    return text is not None and LIST_REPR not in text and all(content in text for content in contents)
