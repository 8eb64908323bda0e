"""langchain-openai: messages with media, streams, tools and structured output, on chat completions and Responses."""

from __future__ import annotations

from typing import Literal

from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from openai import BadRequestError
from pydantic import BaseModel, SecretStr
from samples import ANSWER, BASE_URL, CLIP, DESCRIPTION, MODEL, PICTURE, QUESTION, TRANSCRIPT, assert_equal, encode


class Shape(BaseModel, extra="forbid"):  # a small model would invent further fields
    """A shape of the picture."""

    color: Literal["red", "green", "blue"]
    is_big: bool


@tool
def paint(color: Literal["red", "green"], big: bool) -> str:
    """Paint a shape."""
    return f"painted {color} {big}"


def model(**options: object) -> ChatOpenAI:
    """Return the chat model with further options."""
    return ChatOpenAI(
        model=MODEL, base_url=BASE_URL, api_key=SecretStr("none"), temperature=0, max_retries=0, **options
    )


PICTURE_PART = {"type": "image", "base64": encode(PICTURE), "mime_type": "image/png"}
CLIP_PART = {"type": "audio", "base64": encode(CLIP), "mime_type": "audio/flac"}
for responses in (False, True):
    chat = model(use_responses_api=responses, max_tokens=512)
    assert_equal(chat.invoke(QUESTION).text, ANSWER)
    assert_equal("".join(chunk.text for chunk in chat.stream(QUESTION)), ANSWER)
    described = chat.invoke([HumanMessage([PICTURE_PART, {"type": "text", "text": "describe the picture"}])])
    assert_equal(described.text, DESCRIPTION)
    if not responses:  # Responses has no audio part.
        heard = chat.invoke([HumanMessage([CLIP_PART, {"type": "text", "text": "transcribe the audio"}])])
        assert_equal(heard.text, TRANSCRIPT)
    call = chat.bind_tools([paint], tool_choice="required", strict=True, parallel_tool_calls=False).invoke(QUESTION)
    assert_equal(call.tool_calls[0]["name"], "paint")
    result = paint.invoke(call.tool_calls[0])
    assert isinstance(result, ToolMessage) and result.text.startswith("painted"), result
    chat.bind_tools([paint]).invoke([HumanMessage(QUESTION), call, result])
    for method in ("json_schema", "function_calling"):
        structured = chat.with_structured_output(Shape, method=method, strict=True)
        assert isinstance(structured.invoke(QUESTION), Shape), method
    with_tools = chat.with_structured_output(Shape, method="json_schema", include_raw=True, tools=[paint], strict=True)
    both = with_tools.invoke(QUESTION)
    assert both["raw"].tool_calls or isinstance(both["parsed"], Shape), both
    agent = create_agent(chat, tools=[paint], response_format=ProviderStrategy(Shape, strict=True))
    state = agent.invoke({"messages": [HumanMessage(QUESTION)]}, {"recursion_limit": 50})
    assert isinstance(state["structured_response"], Shape), state

completion = OpenAI(model=MODEL, base_url=BASE_URL, api_key=SecretStr("none"), temperature=0, max_tokens=8)
assert isinstance(completion.invoke("<|user|>one"), str)
try:
    model(max_tokens=8).invoke("one " * 5000)
    raise AssertionError("a prompt longer than the context was accepted")
except BadRequestError as error:
    assert_equal(type(error).__name__, "OpenAIContextOverflowError")
