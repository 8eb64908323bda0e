"""llama-index: `OpenAILike` as chat and completion model, streams, tools and typed output."""

import asyncio
from typing import Literal

from llama_index.core.base.llms.types import AudioBlock, ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from samples import ANSWER, BASE_URL, CLIP, DESCRIPTION, MODEL, PICTURE, QUESTION, TRANSCRIPT, assert_equal


class Shape(BaseModel):
    """A shape of the picture."""

    color: Literal["red", "green", "blue"]
    is_big: bool


def paint(color: Literal["red", "green"]) -> str:
    """Paint the shape."""
    return f"painted {color}"


def ask(text: str, *blocks: ImageBlock | AudioBlock) -> list[ChatMessage]:
    """Return one user message."""
    return [ChatMessage(role="user", blocks=[*blocks, TextBlock(text=text)])]


common = {"model": MODEL, "api_base": BASE_URL, "api_key": "none", "temperature": 0, "max_retries": 0}
chat = OpenAILike(**common, max_tokens=512, is_chat_model=True, is_function_calling_model=True)
assert_equal(chat.chat(ask(QUESTION)).message.content, ANSWER)
assert_equal(list(chat.stream_chat(ask(QUESTION)))[-1].message.content, ANSWER)
assert_equal(asyncio.run(chat.achat(ask(QUESTION))).message.content, ANSWER)
assert_equal(chat.chat(ask("describe the picture", ImageBlock(path=PICTURE))).message.content, DESCRIPTION)
clip = AudioBlock(path=CLIP, format="flac")
assert_equal(chat.chat(ask("transcribe the audio", clip)).message.content, TRANSCRIPT)
tool = FunctionTool.from_defaults(paint)
called = chat.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
assert_equal(chat.get_tool_calls_from_response(called)[0].tool_name, "paint")
assert isinstance(chat.as_structured_llm(Shape).chat(ask(QUESTION)).raw, Shape)
completion = OpenAILike(**common, max_tokens=8, is_chat_model=False)
assert isinstance(completion.complete("<|user|>one").text, str)
