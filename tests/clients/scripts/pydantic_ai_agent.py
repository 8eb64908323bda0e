"""pydantic-ai: an agent with a typed output and a tool, pictures, streams, on chat completions and Responses."""

from __future__ import annotations

import asyncio
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput, RunContext, Tool, ToolDefinition, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits
from samples import ANSWER, BASE_URL, DESCRIPTION, MODEL, PICTURE, QUESTION, assert_equal


class Shape(BaseModel):
    color: Literal["red", "green", "blue"]
    is_big: bool


def paint(color: Literal["red", "green"]) -> str:
    """Paint the shape."""
    return f"painted {color}"


async def first_turn_only(context: RunContext[None], definition: ToolDefinition) -> ToolDefinition | None:
    """Offer a tool in the first turn: a small model would call it again and again."""
    return definition if context.run_step <= 1 else None


async def main() -> None:
    provider = OpenAIProvider(base_url=BASE_URL, api_key="none")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind(
            MODEL, provider=provider, settings={"temperature": 0, "max_tokens": 512, "parallel_tool_calls": False}
        )
        agent = Agent(model)
        assert_equal((await agent.run(QUESTION)).output, ANSWER)
        async with agent.run_stream(QUESTION) as stream:
            assert_equal(await stream.get_output(), ANSWER)
        picture = BinaryContent(PICTURE.read_bytes(), media_type="image/png")
        assert_equal((await agent.run([picture, "describe the picture"])).output, DESCRIPTION)
        for output_type in (ToolOutput(Shape), NativeOutput(Shape)):
            typed = Agent(model, output_type=output_type, tools=[Tool(paint, prepare=first_turn_only)], retries=5)
            limits = UsageLimits(request_limit=30)
            output = (await typed.run(QUESTION, usage_limits=limits)).output
            assert isinstance(output, Shape), output


asyncio.run(main())
