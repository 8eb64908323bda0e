"""`GenerationService`: serves a request of any endpoint that generates text, for one prompt or several."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from mmlora.async_llm import AsyncLLM, PreparedRequest
from mmlora.errors import EngineDeadError, MMLoRAError, RequestError
from mmlora.inputs.input_processor import Prompt
from mmlora.processors.media.loader import PromptMedia
from mmlora.sampling_params import SamplingParams
from mmlora.server.bodies import pool_of
from mmlora.server.errors import Refusal, error_body, status_of
from mmlora.server.http.admission import read_body
from mmlora.server.http.auth import CALLER
from mmlora.server.lora.served_models import ServedModels
from mmlora.server.openai.logprobs import check_prompt_logprobs
from mmlora.server.openai.output import Outputs, ResponseBuilder, close, raise_failure, respond_with
from mmlora.server.openai.protocol import CommonFields

T = TypeVar("T")


@dataclass(frozen=True)
class Generation:
    """A request that was parsed and validated.

    Attributes:
        request: the fields of the body.
        prompts: the prompts, by engine request id.
        media: media of all prompts; None if there are none.
        params: sampling parameters of all prompts.
        builder: builds the response.
        num_prompt_copies: how often the response repeats the log probabilities of each prompt.
    """

    request: CommonFields
    prompts: Mapping[str, Prompt]
    media: PromptMedia | None
    params: SamplingParams
    builder: ResponseBuilder
    num_prompt_copies: int = 1


class GenerationService(ABC):
    """An endpoint that generates text.

    Attributes:
        FIELDS: field of the endpoint by argument of the engine, where the two have different names; errors use it.

    Args:
        llm: the engine.
        models: served model and adapter names.
        max_request_bytes: size limit of request bodies.
    """

    FIELDS: ClassVar[Mapping[str, str]] = {}
    TAKES_JSON: ClassVar[bool] = True  # otherwise bodies are forms

    def __init__(self, llm: AsyncLLM, models: ServedModels, max_request_bytes: int) -> None:
        self._llm = llm
        self._models = models
        self._max_request_bytes = max_request_bytes

    async def respond(self, request: Request) -> Response:
        """Serve one HTTP request; a client that disconnects aborts it.

        Raises:
            MMLoRAError: the request cannot be served, or failed before the response began.
        """
        with rename_param(self.FIELDS):
            generation = await self._read(request)
            outputs = self._generate(generation)
            return await respond_with(request, generation.builder, outputs, is_stream=bool(generation.request.stream))

    async def _read(self, request: Request) -> Generation:
        """Read and parse the body, which is not kept."""
        body = await read_body(request, self._max_request_bytes, is_json=self.TAKES_JSON)
        return await self._llm.run_in_pool(self._parse, request, body, CALLER.get(), pool=pool_of(body))

    @abstractmethod
    def _parse(self, request: Request, body: bytes, caller: str) -> Generation:
        """Parse and validate a request in the thread pool; no media are fetched yet.

        Args:
            request: the HTTP request, for its headers.
            body: the whole body.
            caller: identifies the client; media uuids are scoped to it.

        Raises:
            RequestError: a field is malformed, invalid or not supported.
        """

    async def _generate(self, generation: Generation) -> Outputs:
        """Yield output deltas. No prompt is started unless all can be served; closing the iterator aborts all.

        Raises:
            MMLoRAError: the request cannot be served, or failed.
        """
        request, params = generation.request, generation.params
        lora_request = await self._models.find_adapter(request.model, request.lora)
        if generation.media is not None:
            await generation.media.fetch()
        ready, priority = [], request.priority or 0
        group = next(iter(generation.prompts))  # all prompts share the turns of one request
        for index, (request_id, prompt) in enumerate(generation.prompts.items()):
            with name_prompt(index, len(generation.prompts)), self._models.log_failures(request.model, request.lora):
                ready.append(await self._llm.prepare(prompt, params, request_id, lora_request, priority, group))
        if params.prompt_logprobs is not None:
            num_tokens = sum(len(prepared.input.prompt_token_ids) for prepared in ready)
            vocab_size = len(self._llm.tokenizer)
            check_prompt_logprobs(num_tokens, params.prompt_logprobs, vocab_size, n=generation.num_prompt_copies)
        sources = [self._run(prepared, generation, index) for index, prepared in enumerate(ready)]
        outputs = merge(sources) if len(sources) > 1 else sources[0]
        try:
            async for output in outputs:
                yield output
        finally:
            await close(outputs)

    async def _run(self, prepared: PreparedRequest, generation: Generation, index: int) -> Outputs:
        """Yield the deltas of one prompt."""
        request, builder = generation.request, generation.builder
        outputs = self._llm.run(prepared)
        must_begin = builder.repeats_prompt
        try:
            with name_prompt(index, len(generation.prompts)), self._models.log_failures(request.model, request.lora):
                async for output in outputs:
                    raise_failure(output)
                    if must_begin:
                        await self._llm.run_in_pool(builder.begin, output)
                        must_begin = False
                    yield output
        finally:
            await close(outputs)


@contextmanager
def rename_param(fields: Mapping[str, str]) -> Iterator[None]:
    """Name the endpoint's field in errors about an argument of the engine.

    Args:
        fields: field by argument; other names stay.

    Raises:
        RequestError: the same error, with the field in `param` and at the start of its message.
    """
    try:
        yield
    except RequestError as error:
        field = fields.get(error.param or "")
        if field is not None:
            message = str(error)
            if message.startswith(f"{error.param}="):
                error.args = (field + message.removeprefix(str(error.param)),)
            error.param = field
        raise


@contextmanager
def name_prompt(index: int, num_prompts: int) -> Iterator[None]:
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
