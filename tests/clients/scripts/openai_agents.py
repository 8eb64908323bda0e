"""openai-agents: an agent with `output_type` and a tool, whole and streamed, on Responses and chat completions."""

from __future__ import annotations

import asyncio
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel
from samples import ANSWER, BASE_URL, MODEL, QUESTION, assert_equal

painted: list[str] = []


class Shape(BaseModel):
    color: Literal["red", "green", "blue"]
    is_big: bool


@function_tool
def paint(color: Literal["red", "green"]) -> str:
    """Paint the shape."""
    painted.append(color)
    return f"painted {color}"


async def main() -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=BASE_URL, api_key="none", max_retries=0)
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        model = kind(model=MODEL, openai_client=client)
        plain = Agent(name="plain", model=model, model_settings=ModelSettings(temperature=0))
        assert_equal((await Runner.run(plain, QUESTION)).final_output, ANSWER)
        # The tool is required in the first turn; the second chooses between another call and the output.
        settings = ModelSettings(
            temperature=1, tool_choice="required", parallel_tool_calls=False, max_tokens=512, extra_body={"seed": 1}
        )
        typed = Agent(name="typed", model=model, tools=[paint], output_type=Shape, model_settings=settings)
        painted.clear()
        result = await Runner.run(typed, QUESTION, max_turns=40)
        assert isinstance(result.final_output, Shape) and painted, result
        painted.clear()
        stream = Runner.run_streamed(typed, QUESTION, max_turns=40)
        async for _ in stream.stream_events():
            pass
        assert isinstance(stream.final_output, Shape) and painted, stream


asyncio.run(main())
