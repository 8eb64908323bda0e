"""`ChatService`: one chat completion from its body to its answer, whole or streamed."""

import json
import logging
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mmlora.async_llm import AsyncLLM
from mmlora.chat import load_chat_template, render_chat
from mmlora.errors import AdapterError, MMLoRAError
from mmlora.outputs import RequestOutput
from mmlora.sampling_params import SamplingParams
from mmlora.server.answers import Answer, Json, lora_headers, raise_failure
from mmlora.server.errors import Refusal, error_body
from mmlora.server.json_answer import JSONAnswer
from mmlora.server.limits import read_body, until_disconnect
from mmlora.server.models import ServedModels
from mmlora.server.protocol import ChatCompletionRequest, parse_chat_request

logger = logging.getLogger(__name__)
Outputs = AsyncIterator[RequestOutput]


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
        answer = Answer(request_id, chat.model or self._models.base_name, _top_logprobs(chat))
        outputs = self._generate(chat, request_id)
        if not chat.stream:
            parts = await until_disconnect(request, _collect(outputs))
            return JSONAnswer(answer.complete(parts), headers=lora_headers(parts[-1].lora))
        # The headers name the adapter and a refusal needs its status: both are known with the first output.
        first = await until_disconnect(request, _next(outputs))
        events = _events(answer, first, outputs, include_usage=chat.include_usage)
        return EventStream(events, headers=lora_headers(first.lora))

    async def _generate(self, chat: ChatCompletionRequest, request_id: str) -> Outputs:
        params: SamplingParams = self._llm.engine.default_sampling_params(**chat.sampling_options())
        lora_request = await self._models.find(chat.model, chat.lora)
        prompt = await self._llm.run_in_pool(self._render, chat)
        outputs = self._llm.generate(prompt, params, request_id, lora_request)
        try:
            async for output in outputs:
                raise_failure(output)
                yield output
        except AdapterError as error:  # clients name adapters that are served; what ails their files is not theirs
            self._models.resolve(chat.model, chat.lora)  # unless one was unloaded meanwhile, which is 404
            logger.exception("an adapter that is served cannot be used")
            message = "the adapter of this request cannot be used now; the server's log says why"
            raise Refusal(500, message, param="model") from error
        finally:
            await _close(outputs)

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


class EventStream(StreamingResponse):
    """Server-sent events that close their source when the client leaves, wherever the stream stood."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await _close(self.body_iterator)


async def _events(answer: Answer, first: RequestOutput, outputs: Outputs, *, include_usage: bool) -> AsyncIterator[str]:
    """The chunks of a stream as events. The status is sent by now, so a failure is an event of its own."""
    try:
        for chunk in answer.first_chunks(first, include_usage=include_usage):
            yield _event(chunk)
        last = first
        for chunk in answer.chunks(first, include_usage=include_usage):
            yield _event(chunk)
        async for last in outputs:
            for chunk in answer.chunks(last, include_usage=include_usage):
                yield _event(chunk)
        if include_usage:
            yield _event(answer.usage_chunk(last))
    except Exception as error:
        if not isinstance(error, MMLoRAError):
            logger.exception("a stream failed")
        yield _event(error_body(error))
    finally:
        await _close(outputs)
    yield "data: [DONE]\n\n"


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def _collect(outputs: Outputs) -> list[RequestOutput]:
    try:
        return [output async for output in outputs]
    finally:
        await _close(outputs)


async def _next(outputs: Outputs) -> RequestOutput:
    try:
        return await anext(outputs)
    except BaseException:
        await _close(outputs)
        raise


async def _close(iterator: object) -> None:
    """End an async generator now rather than when it is collected: this is what aborts a request."""
    close = getattr(iterator, "aclose", None)
    if close is not None:
        await close()


def _top_logprobs(chat: ChatCompletionRequest) -> int | None:
    return chat.top_logprobs or 0 if chat.logprobs else None
