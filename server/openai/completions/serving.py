"""`CompletionService`: from the body of a legacy completion, of one prompt or several, to its response."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from mmlora.async_llm import AsyncLLM, PreparedRequest
from mmlora.errors import EngineDeadError, MMLoRAError
from mmlora.processors.media.loader import PromptMedia, parse_references
from mmlora.sampling_params import SamplingParams
from mmlora.server.errors import Refusal, error_body, status_of
from mmlora.server.http.admission import read_body
from mmlora.server.http.auth import CALLER
from mmlora.server.lora.served_models import ServedModels
from mmlora.server.openai.completions.output import CompletionBuilder
from mmlora.server.openai.completions.protocol import CompletionRequest, TextOrTokens, parse_completion_request
from mmlora.server.openai.logprobs import check_prompt_logprobs
from mmlora.server.openai.output import Outputs, close, raise_failure, respond_with

T = TypeVar("T")


@dataclass(frozen=True)
class _ParsedCompletion:
    """A request that was parsed and validated, with its prompts as the engine takes them."""

    request: CompletionRequest
    builder: CompletionBuilder
    params: SamplingParams
    prompts: list[dict[str, Any]]
    media: PromptMedia | None


class CompletionService:
    """Serves `/v1/completions`.

    Args:
        llm: the engine.
        models: served model and adapter names.
        max_request_bytes: size limit of request bodies.
    """

    def __init__(self, llm: AsyncLLM, models: ServedModels, max_request_bytes: int) -> None:
        self._llm = llm
        self._models = models
        self._max_request_bytes = max_request_bytes

    async def respond(self, request: Request) -> Response:
        """Serve one HTTP request; a client that disconnects aborts all its prompts.

        Raises:
            MMLoRAError: the request cannot be served, or failed before the response began.
        """
        body = await read_body(request, self._max_request_bytes)
        parsed = await self._llm.run_in_pool(self._parse, body, CALLER.get())
        outputs = self._generate(parsed)
        return await respond_with(request, parsed.builder, outputs, is_stream=bool(parsed.request.stream))

    def _parse(self, body: bytes, caller: str) -> _ParsedCompletion:
        """Parse and validate a body, outside the event loop; nothing is fetched or decoded yet."""
        request = parse_completion_request(body)
        builder = CompletionBuilder(
            f"cmpl-{uuid.uuid4().hex}", request.model or self._models.base_name, request, self._llm.tokenizer
        )
        references = parse_references(
            request.multi_modal_data or {},
            request.multi_modal_uuids or {},
            self._llm.processor.modalities if self._llm.processor is not None else (),
            self._llm.args.limit_mm_per_prompt,
        )
        media = PromptMedia(self._llm.media, references, caller) if references else None
        options = {"mm_processor_kwargs": request.mm_processor_kwargs, "cache_salt": request.cache_salt}
        prompts = []
        for index, prompt in enumerate(request.prompts):
            with _name_prompt(index, len(request.prompts)):
                prompts.append({**options, "multi_modal_data": media, **self._prompt_fields(request, prompt)})
        params = self._llm.default_sampling_params(**request.sampling_options())
        return _ParsedCompletion(request, builder, params, prompts, media)

    def _prompt_fields(self, request: CompletionRequest, prompt: TextOrTokens) -> dict[str, Any]:
        if not isinstance(prompt, str):
            return {"prompt_token_ids": prompt}
        if request.add_special_tokens is False:
            return {"prompt": prompt, "prompt_token_ids": self._llm.encode(prompt, add_special_tokens=False)}
        return {"prompt": prompt}

    async def _generate(self, parsed: _ParsedCompletion) -> Outputs:
        """Yield the deltas of all prompts; none is started unless all can be served."""
        request, builder, params = parsed.request, parsed.builder, parsed.params
        lora_request = await self._models.find_adapter(request.model, request.lora)
        ready = []
        if parsed.media is not None:
            await parsed.media.fetch()
        for index, (prompt, request_id) in enumerate(zip(parsed.prompts, builder.request_ids, strict=True)):
            with _name_prompt(index, len(parsed.prompts)), self._models.log_failures(request.model, request.lora):
                ready.append(await self._llm.prepare(prompt, params, request_id, lora_request, request.priority or 0))
        num_tokens = sum(len(prepared.input.prompt_token_ids) for prepared in ready)
        check_prompt_logprobs(num_tokens, request.num_prompt_logprobs, len(self._llm.tokenizer), n=params.n)
        outputs = merge([self._run(prepared, builder, request, index) for index, prepared in enumerate(ready)])
        try:
            async for output in outputs:
                yield output
        finally:
            await close(outputs)

    async def _run(
        self, prepared: PreparedRequest, builder: CompletionBuilder, request: CompletionRequest, index: int
    ) -> Outputs:
        """Yield the deltas of one prompt."""
        outputs = self._llm.run(prepared)
        must_begin = bool(request.echo) or request.prompt_logprobs is not None
        try:
            with _name_prompt(index, len(request.prompts)), self._models.log_failures(request.model, request.lora):
                async for output in outputs:
                    raise_failure(output)
                    if must_begin:
                        await self._llm.run_in_pool(builder.begin, output)
                        must_begin = False
                    yield output
        finally:
            await close(outputs)


@contextmanager
def _name_prompt(index: int, num_prompts: int) -> Iterator[None]:
    """Add the index of the prompt to errors, if there are several prompts.

    Raises:
        Refusal: in place of the error, with the same status and public message.
    """
    try:
        yield
    except EngineDeadError:  # concerns all prompts
        raise
    except MMLoRAError as error:
        if num_prompts == 1:
            raise
        details = error_body(error)["error"]
        message = f"prompt[{index}]: {details['message']}"
        raise Refusal(status_of(error), message, param=details["param"], code=details["code"]) from error


async def merge(sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[T, None]:
    """Yield the items of all sources as they arrive. The first failure, and leaving early, end all sources.

    Each source runs in one task, which also closes it.

    Raises:
        Exception: a source raised it.
    """
    queue: asyncio.Queue[T | _End] = asyncio.Queue()
    tasks = [asyncio.create_task(_move(source, queue)) for source in sources]
    num_running = len(tasks)
    try:
        while num_running:
            item = await queue.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                num_running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class _End:
    """Marks the end of a source in the queue."""

    error: Exception | None


async def _move(source: AsyncIterator[T], queue: "asyncio.Queue[T | _End]") -> None:
    failure = None
    try:
        async for item in source:
            queue.put_nowait(item)
    except Exception as error:
        failure = error
    finally:
        await close(source)
    queue.put_nowait(_End(failure))
