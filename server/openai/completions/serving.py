"""`CompletionService`: one completion, of one prompt or several, from its body to its answer, whole or streamed."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from mmlora.async_llm import AsyncLLM, RequestStream
from mmlora.errors import EngineDeadError, MMLoRAError
from mmlora.processors.fetch.loader import PromptMedia
from mmlora.processors.fetch.reference import MediaReference, references_of
from mmlora.sampling_params import SamplingParams
from mmlora.server.errors import Refusal, error_body, status_of
from mmlora.server.http.admission import read_body
from mmlora.server.http.auth import CALLER
from mmlora.server.lora.served_models import ServedModels
from mmlora.server.openai.completions.output import CompletionBuilder
from mmlora.server.openai.completions.protocol import CompletionRequest, TextOrTokens, parse_completion_request
from mmlora.server.openai.logprobs import check_prompt_logprobs
from mmlora.server.openai.output import raise_failure
from mmlora.server.openai.streaming import Outputs, close, respond_with

References = dict[str, list[MediaReference]]
T = TypeVar("T")


class CompletionService:
    """Answers completions.

    Args:
        llm: the engine.
        models: the names that clients may ask for.
        max_request_bytes: the largest body.
    """

    def __init__(self, llm: AsyncLLM, models: ServedModels, max_request_bytes: int) -> None:
        self._llm = llm
        self._models = models
        self._max_request_bytes = max_request_bytes

    async def respond(self, request: Request) -> Response:
        """Serve one HTTP request; when the client leaves, the work stops, of all its prompts.

        Raises:
            MMLoRAError: the request cannot be served, or failed before the answer began.
        """
        body = await read_body(request, self._max_request_bytes)
        asked = await self._llm.run_in_pool(parse_completion_request, body)
        model = asked.model or self._models.base_name
        answer = CompletionBuilder(f"cmpl-{uuid.uuid4().hex}", model, asked, self._llm.tokenizer)
        outputs = self._generate(asked, answer)
        return await respond_with(request, answer, outputs, is_stream=bool(asked.stream))

    async def _generate(self, asked: CompletionRequest, answer: CompletionBuilder) -> Outputs:
        params: SamplingParams = self._llm.default_sampling_params(**asked.sampling_options())
        lora_request = await self._models.find_adapter(asked.model, asked.lora)
        prompts = asked.prompts
        ready = []
        for index, (prompt, request_id) in enumerate(zip(prompts, answer.request_ids, strict=True)):
            with _naming_prompt(index, len(prompts)), self._models.log_failures(asked.model, asked.lora):
                fields = await self._load(asked, prompt)
                ready.append(await self._llm.prepare(fields, params, request_id, lora_request, asked.priority or 0))
        num_tokens = sum(len(request.input.prompt_token_ids) for request in ready)
        check_prompt_logprobs(num_tokens, asked.num_prompt_logprobs, len(self._llm.tokenizer), n=params.n)
        followed = [self._follow(request, answer, asked, index) for index, request in enumerate(ready)]
        outputs = merge(followed)
        try:
            async for output in outputs:
                yield output
        finally:
            await close(outputs)

    async def _follow(
        self, ready: RequestStream, answer: CompletionBuilder, asked: CompletionRequest, index: int
    ) -> Outputs:
        """The deltas of one prompt."""
        outputs, is_first = self._llm.run(ready), True
        try:
            with _naming_prompt(index, len(asked.prompts)), self._models.log_failures(asked.model, asked.lora):
                async for output in outputs:
                    raise_failure(output)
                    if is_first:
                        await self._llm.run_in_pool(answer.begin, output)
                        is_first = False
                    yield output
        finally:
            await close(outputs)

    async def _load(self, asked: CompletionRequest, prompt: TextOrTokens) -> dict[str, Any]:
        """A prompt as the engine takes it, its media fetched and decoded."""
        media = self._llm.media.begin(CALLER.get())
        references = await self._llm.run_in_pool(self._references, asked)
        await media.fetch(reference for found in references.values() for reference in found)
        return await self._llm.run_in_pool(self._decode, asked, prompt, references, media)

    def _references(self, asked: CompletionRequest) -> References:
        processor = self._llm.processor
        return references_of(
            asked.multi_modal_data or {},
            asked.multi_modal_uuids or {},
            processor.modalities if processor is not None else (),
            self._llm.args.limit_mm_per_prompt,
        )

    def _decode(
        self, asked: CompletionRequest, prompt: TextOrTokens, references: References, media: PromptMedia
    ) -> dict[str, Any]:
        items = {modality: [media.load(reference) for reference in found] for modality, found in references.items()}
        fields: dict[str, Any] = {
            "multi_modal_data": items,
            "mm_processor_kwargs": asked.mm_processor_kwargs,
            "cache_salt": asked.cache_salt,
        }
        if not isinstance(prompt, str):
            return {**fields, "prompt_token_ids": prompt}
        if asked.add_special_tokens is False:
            fields["prompt_token_ids"] = self._llm.encode(prompt, add_special_tokens=False)
        return {**fields, "prompt": prompt}


@contextmanager
def _naming_prompt(index: int, num_prompts: int) -> Iterator[None]:
    """Say which of several prompts an error is about.

    Raises:
        Refusal: in place of the error, with its status and what clients are told of it.
    """
    try:
        yield
    except EngineDeadError:  # about all of them
        raise
    except MMLoRAError as error:
        if num_prompts == 1:
            raise
        told = error_body(error)["error"]
        message = f"prompt[{index}]: {told['message']}"
        raise Refusal(status_of(error), message, param=told["param"], code=told["code"]) from error


async def merge(sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[T, None]:
    """Yield what each source brings, as it comes; the first failure, or leaving early, ends them all.

    Each source is run, and closed if it is a generator, in one task.

    Raises:
        Exception: what a source raised.
    """
    arrived: asyncio.Queue[T | _End] = asyncio.Queue()
    tasks = [asyncio.create_task(_move(source, arrived)) for source in sources]
    num_running = len(tasks)
    try:
        while num_running:
            item = await arrived.get()
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


class _End:
    """Ends a source in the queue of what arrived."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error


async def _move(source: AsyncIterator[T], arrived: "asyncio.Queue[T | _End]") -> None:
    failure = None
    try:
        async for item in source:
            arrived.put_nowait(item)
    except Exception as error:
        failure = error
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()
    arrived.put_nowait(_End(failure))
