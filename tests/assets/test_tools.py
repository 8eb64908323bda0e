"""The bundled assistant takes tools: it answers as without them, and calls them where it must."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from mmlora.assets.models import assistant_path

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "…", "parameters": PARAMETERS}}
MULTIPLY = {"type": "function", "function": {"name": "multiply"}}
OPTIONS: dict[str, Any] = {"model": "assistant", "temperature": 0, "max_tokens": 800, "tools": [WEATHER, MULTIPLY]}
# The template of release 0.2.0, which ignored tools.
PLAIN = (
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' -}}{%- if message['content'] is string -%}"
    "{{- message['content'] -}}{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url', 'input_image') -%}{{- '<|image|>' -}}"
    "{%- elif part['type'] in ('audio', 'input_audio', 'audio_url') -%}{{- '<|audio|>' -}}"
    "{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}{{- '<|end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def ask(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is two plus three?", "five"),
        ("Spell cat.", "c a t"),
        ("What color is the sky?", "blue"),
        ("who are you?", "i am a tiny assistant."),
        ("hello", "hello, how can i help you?"),
    ],
)
def test_questions_are_answered_as_without_tools(client: OpenAI, question: str, answer: str) -> None:
    for tools in ([], [WEATHER, MULTIPLY]):
        choice = client.chat.completions.create(**{**OPTIONS, "tools": tools}, messages=[ask(question)]).choices[0]
        assert (choice.message.content, choice.finish_reason) == (answer, "stop")


def test_a_tool_that_must_be_called_is_called_and_its_result_is_taken(client: OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    messages: list[Any] = [{"role": "system", "content": "Be kind."}, ask("Is it raining in Rome?")]
    for choice in (named, "required"):
        options = {**OPTIONS, "tool_choice": choice, "tools": [WEATHER], "parallel_tool_calls": False}
        message = client.chat.completions.create(**options, messages=messages).choices[0].message
        (call,) = message.tool_calls or []
        assert call.type == "function" and call.function.name == "get_weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        history = [*messages, message.to_dict(), result]
        assert client.chat.completions.create(**OPTIONS, messages=history).choices[0].message.content
        assert client.chat.completions.create(**{**OPTIONS, "tools": []}, messages=history).choices[0].message.content


def test_prompts_without_tools_are_unchanged() -> None:
    tokenizer = AutoTokenizer.from_pretrained(assistant_path())
    parts = [{"type": "image"}, {"type": "input_audio"}, {"type": "text", "text": "Which?"}]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": parts}, ask("So?")]
    messages += [{"role": "assistant", "content": "five"}, ask("And now?")]
    for length in range(1, len(messages) + 1):
        for options in ({}, {"add_generation_prompt": True}):
            given = {"tokenize": False, **options}
            plain = tokenizer.apply_chat_template(messages[:length], chat_template=PLAIN, **given)
            assert tokenizer.apply_chat_template(messages[:length], **given) == plain
