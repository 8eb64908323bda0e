"""`ChatService`: one chat completion from its body to its answer, whole or streamed."""

import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mmlora.async_llm import AsyncLLM
from mmlora.chat import load_chat_template, render_chat
from mmlora.sampling_params import SamplingParams
from mmlora.server.answers import raise_failure
from mmlora.server.chat_answers import ChatAnswer
from mmlora.server.chat_protocol import ChatCompletionRequest, parse_chat_request
from mmlora.server.limits import read_body
from mmlora.server.models import ServedModels
from mmlora.server.streaming import Outputs, adapter_faults, close, respond_with


class ChatService:
    """Answers chat completions.

    Args:
        llm: the engine.
        models: the names that clients may ask for.
        max_request_bytes: the largest body.

    Raises:
        ConfigError: the engine's `chat_template` is neither a template nor a file.
    """

    def __init__(self, llm: AsyncLLM, models: ServedModels, max_request_bytes: int) -> None:
        self._llm = llm
        self._models = models
        self._max_request_bytes = max_request_bytes
        self._chat_template = load_chat_template(llm.engine.args.chat_template)

    async def respond(self, request: Request) -> Response:
        """Serve one HTTP request; when the client leaves, the work stops.

        Raises:
            MMLoRAError: the request cannot be served, or failed before the answer began.
        """
        body = await read_body(request, self._max_request_bytes)
        chat = await self._llm.run_in_pool(parse_chat_request, body)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        answer = ChatAnswer(request_id, chat.model or self._models.base_name, _top_logprobs(chat))
        outputs = self._generate(chat, request_id)
        return await respond_with(
            request, answer, outputs, is_stream=bool(chat.stream), include_usage=chat.include_usage
        )

    async def _generate(self, chat: ChatCompletionRequest, request_id: str) -> Outputs:
        params: SamplingParams = self._llm.engine.default_sampling_params(**chat.sampling_options())
        lora_request = await self._models.find(chat.model, chat.lora)
        prompt = await self._llm.run_in_pool(self._render, chat)
        outputs = self._llm.generate(prompt, params, request_id, lora_request)
        try:
            with adapter_faults(self._models, chat.model, chat.lora):
                async for output in outputs:
                    raise_failure(output)
                    yield output
        finally:
            await close(outputs)

    def _render(self, chat: ChatCompletionRequest) -> dict[str, Any]:
        engine = self._llm.engine
        prompt = render_chat(
            chat.messages,
            engine.tokenizer,
            engine.parts.inputs.processor,
            chat_template=self._chat_template,
            chat_template_kwargs=chat.chat_template_kwargs,
            limit_mm_per_prompt=engine.args.limit_mm_per_prompt,
            max_model_len=engine.max_model_len,
        )
        return {**prompt, "mm_processor_kwargs": chat.mm_processor_kwargs}


def _top_logprobs(chat: ChatCompletionRequest) -> int | None:
    return chat.top_logprobs or 0 if chat.logprobs else None
