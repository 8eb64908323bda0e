"""LiteLLM: its `openai/` and `hosted_vllm/` providers, streams, tools, structured output and error for long prompts."""

from __future__ import annotations

import json
from typing import Any, Literal

import litellm
from pydantic import BaseModel
from samples import ANSWER, BASE_URL, CLIP, DESCRIPTION, MODEL, PICTURE, QUESTION, TRANSCRIPT, assert_equal, data_url


class Shape(BaseModel, extra="forbid"):
    color: Literal["red", "green", "blue"]
    is_big: bool


TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {"big": {"type": "boolean"}},
            "required": ["big"],
            "additionalProperties": False,
        },
    },
}
QUESTIONS = [{"role": "user", "content": QUESTION}]
PICTURES = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": data_url(PICTURE)}},
            {"type": "text", "text": "describe the picture"},
        ],
    }
]
for provider in ("openai", "hosted_vllm"):
    options: dict[str, Any] = {
        "model": f"{provider}/{MODEL}",
        "api_base": BASE_URL,
        "api_key": "none",
        "temperature": 0,
        "max_tokens": 512,
    }
    whole = litellm.completion(messages=QUESTIONS, **options)
    assert_equal(whole.choices[0].message.content, ANSWER)
    chunks = litellm.completion(messages=QUESTIONS, stream=True, stream_options={"include_usage": True}, **options)
    assert_equal("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), ANSWER)
    assert_equal(litellm.completion(messages=PICTURES, **options).choices[0].message.content, DESCRIPTION)
    called = litellm.completion(
        messages=QUESTIONS, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, **options
    )
    assert_equal(called.choices[0].message.tool_calls[0].function.name, "paint")
    shaped = litellm.completion(messages=QUESTIONS, response_format=Shape, **options)
    Shape(**json.loads(shaped.choices[0].message.content))
    try:
        litellm.completion(messages=[{"role": "user", "content": "one " * 5000}], **options)
        raise AssertionError("a prompt longer than the context was accepted")
    except litellm.ContextWindowExceededError:
        pass
    with CLIP.open("rb") as clip:
        heard = litellm.transcription(model=f"{provider}/{MODEL}", file=clip, api_base=BASE_URL, api_key="none")
    assert_equal(heard.text, TRANSCRIPT)
assert_equal(
    litellm.responses(model=f"openai/{MODEL}", input=QUESTION, api_base=BASE_URL, api_key="none").status, "completed"
)
