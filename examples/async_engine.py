"""Stream several responses concurrently with `AsyncLLM`; each output holds the new text."""

import asyncio

from mmlora import AsyncLLM, EngineArgs, SamplingParams
from mmlora.assets.models import assistant_path


async def answer(llm: AsyncLLM, question: str) -> str:
    prompt = f"<|user|>{question}<|end|><|assistant|>"
    text = ""
    async for output in llm.generate(prompt, SamplingParams(temperature=0, max_tokens=32)):
        text += output.outputs[0].text
    return f"{question} {text}"


async def main() -> None:
    llm = AsyncLLM(EngineArgs(assistant_path()))
    try:
        questions = ["what is two plus three?", "what comes after seven?", "what color is the sky?"]
        for line in await asyncio.gather(*(answer(llm, question) for question in questions)):
            print(line)
    finally:
        llm.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
