"""OpenAI-style messages to a prompt: the chat template is rendered, media parts become placeholders and items.

Some templates take content as a list of parts, others only strings; which one is found out by rendering.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from mmlora.errors import ConfigError, RequestError
from mmlora.inputs.chat_tools import PHI4_MARKS, Message, Tools, check_tools, render_with_tools, with_read_calls
from mmlora.inputs.prompts import encode_text
from mmlora.processors.base import MultiModalProcessor
from mmlora.processors.fetch.loader import MediaLoader, PromptMedia
from mmlora.processors.fetch.reference import MediaReference
from mmlora.processors.media.decoding import check_counts, why_not_taken
from mmlora.processors.media.items import MediaItem
from mmlora.utils.text import shorten

MODALITIES = {"image_url": "image", "input_audio": "audio", "audio_url": "audio", "image": "image", "audio": "audio"}
SPELLED_LIST = "'type':"  # in the text of a template that wrote a list of parts as Python spells it
PART_TYPES = ("text", *MODALITIES)
MAX_REASON_CHARS = 400


@dataclass(frozen=True)
class CheckedMessages:
    """Messages of the right form: each with its parts, text and media."""

    turns: list[tuple[Message, list[str | MediaReference]]]

    @property
    def media(self) -> list[MediaReference]:
        """All media, in order."""
        return [part for _, parts in self.turns for part in parts if not isinstance(part, str)]


def load_chat_template(template: str | None) -> str | None:
    """The template that `chat_template` gives: Jinja text, or the content of a file.

    Raises:
        ConfigError: it looks like a file that does not exist.
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


def render_chat(
    messages: Sequence[Message] | CheckedMessages,
    tokenizer: Any,
    processor: MultiModalProcessor | None,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    media: PromptMedia | None = None,
    limit_mm_per_prompt: Mapping[str, int] | None = None,
    max_model_len: int | None = None,
    tools: Tools | None = None,
) -> dict[str, Any]:
    """Render a conversation to a prompt for `LLM.generate`.

    Args:
        messages: with `role` and `content`, text or a list of parts: `text`, `image_url`, `input_audio`,
            `audio_url`, and from Python `image` (PIL) and `audio` (`(array, rate)`), each with a `uuid` if it likes; an
            assistant's message may have `tool_calls`. Or what `check_messages` made of them.
        tokenizer: its template is used unless `chat_template` is given.
        processor: names the placeholders; None for a text-only model.
        chat_template_kwargs: passed to the template.
        add_generation_prompt: end with the start of the assistant's turn; by default unless the last message is
            continued.
        continue_final_message: leave the last message open, so that the answer goes on with it.
        media: loads them; by default within `MediaLimits()`, from data: URLs and public servers.
        limit_mm_per_prompt: most items by modality, counted before any is decoded.
        max_model_len: text that cannot fit into so many tokens is refused before it is tokenized.
        tools: OpenAI's, passed to the template.

    Returns:
        `{"prompt_token_ids", "prompt", "multi_modal_data"}`; the prompt is the rendered text.

    Raises:
        RequestError: a message has the wrong form, or there is no template, or it leaves out tools or calls.
        MediaError: a media item cannot be used.
    """
    if add_generation_prompt and continue_final_message:
        raise RequestError("add_generation_prompt and continue_final_message exclude each other; give one of them")
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    check_tools(tools or ())
    if not isinstance(messages, CheckedMessages):
        messages = check_messages(messages, processor, limit_mm_per_prompt)
    loader = media or MediaLoader().begin()
    conversation = [
        (message, [part if isinstance(part, str) else loader.load(part) for part in parts])
        for message, parts in messages.turns
    ]
    items = [part for _, parts in conversation for part in parts if not isinstance(part, str)]

    def render(turns: list[dict[str, Any]], tools: Tools | None) -> str:
        kwargs = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **(chat_template_kwargs or {}),
        }
        kwargs |= {"tools": tools} if tools else {}
        try:
            text: str = tokenizer.apply_chat_template(turns, chat_template=chat_template, tokenize=False, **kwargs)
        except (TemplateError, ValueError, TypeError) as error:
            reason = str(error)[:MAX_REASON_CHARS]  # some repeat the whole conversation
            raise RequestError(f"the chat template cannot render these messages: {reason}") from None
        return text

    text = render_with_tools(
        conversation,
        tools,
        lambda turns, tools: _render_parts(turns, items, processor, functools.partial(render, tools=tools)),
        knows_phi4_marks=tokenizer.convert_tokens_to_ids(PHI4_MARKS[0]) not in (None, tokenizer.unk_token_id),
    )
    data: dict[str, list[MediaItem]] = {}
    for item in items:
        data.setdefault(item.modality, []).append(item)
    token_ids = encode_text(tokenizer, text, max_model_len, add_special_tokens=False)
    return {"prompt": text, "prompt_token_ids": token_ids, "multi_modal_data": data}


def _render_parts(
    conversation: list[tuple[Message, list[str | MediaItem]]],
    media: list[MediaItem],
    processor: MultiModalProcessor | None,
    render: Any,
) -> str:
    """Render with parts where the template takes them, else with placeholders written into the text."""
    if not media:
        return _render_text([(message, "".join(map(str, parts))) for message, parts in conversation], render)
    assert processor is not None
    try:
        text = str(render([_turn(message, _template_parts(parts)) for message, parts in conversation]))
        if _has_placeholders(text, media, conversation, processor):
            return text
    except RequestError:
        pass  # a template for strings may fail on a list
    turns = [
        _turn(message, "".join(p if isinstance(p, str) else processor.placeholder_token(p.modality) for p in parts))
        for message, parts in conversation
    ]
    return str(render(turns))


def _render_text(conversation: list[tuple[Message, str]], render: Any) -> str:
    """Render with strings, or with parts where the template loses strings and keeps parts."""
    text = str(render([_turn(message, content) for message, content in conversation]))
    contents = [content.strip() for _, content in conversation]
    if _has_all(text, contents):
        return text
    try:
        with_parts = str(render([_turn(message, _template_parts([content])) for message, content in conversation]))
    except RequestError:
        return text
    num_written = "".join(contents).count(SPELLED_LIST)
    is_kept = _has_all(with_parts, contents) and with_parts.count(SPELLED_LIST) == num_written
    return with_parts if is_kept else text


def _has_all(text: str, contents: Sequence[str]) -> bool:
    """Whether a text holds all contents; each is sought behind the one before, where nearly every template has it.

    To seek them all from the start would take minutes for a conversation of many turns.
    """
    end = 0
    for content in contents:
        start = text.find(content, end)
        if start < 0 and (start := text.find(content)) < 0:
            return False
        end = start + len(content)
    return True


def _has_placeholders(
    text: str,
    media: list[MediaItem],
    conversation: list[tuple[Message, list[str | MediaItem]]],
    processor: MultiModalProcessor,
) -> bool:
    """Whether the template put one placeholder per item, and not the list's own spelling, into the text."""
    written = "".join(part for _, parts in conversation for part in parts if isinstance(part, str))
    for modality in processor.modalities:
        token = processor.placeholder_token(modality)
        num_items = sum(item.modality == modality for item in media)
        if text.count(token) - written.count(token) != num_items:
            return False
    return text.count(SPELLED_LIST) == written.count(SPELLED_LIST)


def _turn(message: Message, content: Any) -> dict[str, Any]:
    return {**message, "content": content}


def _template_parts(parts: list[str | MediaItem]) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} if isinstance(part, str) else {"type": part.modality} for part in parts]


def check_messages(
    messages: Sequence[Message],
    processor: MultiModalProcessor | None,
    limit_mm_per_prompt: Mapping[str, int] | None = None,
) -> CheckedMessages:
    """Read the parts of each message, and count the media; nothing is decoded yet.

    Raises:
        RequestError: a message has the wrong form.
        MediaError: there are too many media, or some that the model does not take.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError("messages must be a list of at least one message")
    checked = CheckedMessages([_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)])
    counts = Counter(reference.modality for reference in checked.media)
    check_counts(counts, processor.modalities if processor is not None else (), limit_mm_per_prompt)
    return checked


def _check_message(message: Message, name: str) -> tuple[Message, list[str | MediaReference]]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"a message must be a mapping with a 'role' and 'content', got {shorten(message)}")
    message = with_read_calls(message, name)
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message, [content or ""]
    if not isinstance(content, Sequence):
        raise RequestError(f"content is a {type(content).__name__}; it must be text or a list of parts")
    return message, [_check_part(part) for part in content]


def message_text(message: Message) -> str:
    """The text of a message, without its media.

    Raises:
        RequestError: it has the wrong form.
    """
    return "".join(part for part in _check_message(message, "message")[1] if isinstance(part, str))


def _check_part(part: Any) -> str | MediaReference:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in PART_TYPES:
        reason = why_not_taken(str(kind)) or f"allowed: {', '.join(PART_TYPES)}"
        raise RequestError(f"content part of type {kind!r}; {reason}")
    value, uuid = part.get(kind), part.get("uuid")
    if value is None and (kind == "text" or uuid is None):
        raise RequestError(f"content part of type {kind!r} lacks its {kind!r} field")
    if kind != "text":
        return _reference(str(kind), value, uuid)
    if not isinstance(value, str):
        raise RequestError(f"content part of type 'text' holds a {type(value).__name__}; it must be text")
    return value


def _reference(kind: str, value: Any, uuid: Any) -> MediaReference:
    """What a part says of its media item; without a value it is the one that the uuid stands for."""
    modality = MODALITIES[kind]
    if value is None or kind in ("image", "audio"):
        return MediaReference(modality, value, "object", uuid)
    if kind == "input_audio":
        return MediaReference(modality, _field(value, kind, "data"), "base64", uuid)
    return MediaReference(modality, value if isinstance(value, str) else _field(value, kind, "url"), "url", uuid)


def _field(value: Any, kind: str, name: str) -> str:
    found = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(found, str):
        raise RequestError(f"content part of type {kind!r} needs {kind}.{name} as a string")
    return found
