"""`GenerationService`: serves a request, for the endpoints that use the chat template."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from mmlora.async_llm import AsyncLLM
from mmlora.inputs.chat import ChatPrompt
from mmlora.sampling_params import SamplingParams
from mmlora.server.http.admission import read_body
from mmlora.server.http.auth import CALLER
from mmlora.server.lora.served_models import LoRAField, ServedModels
from mmlora.server.openai.logprobs import check_prompt_logprobs
from mmlora.server.openai.output import Outputs, ResponseBuilder, close, raise_failure, respond_with


@dataclass(frozen=True)
class Generation:
    """A request that was parsed and validated.

    Attributes:
        request_id: also the id of the response.
        model, lora: fields of the request that select the adapter.
        prompt, params: what to generate from and how.
        builder: builds the response.
        is_stream: send server-sent events.
        priority: lower runs earlier.
    """

    request_id: str
    model: str | None
    lora: LoRAField
    prompt: ChatPrompt
    params: SamplingParams
    builder: ResponseBuilder
    is_stream: bool = False
    priority: int = 0


class GenerationService(ABC):
    """An endpoint that generates text from messages.

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
        """Serve one HTTP request; a client that disconnects aborts it.

        Raises:
            MMLoRAError: the request cannot be served, or failed before the response began.
        """
        generation = await self._llm.run_in_pool(
            self._parse, request, await read_body(request, self._max_request_bytes), CALLER.get()
        )
        outputs = self._generate(generation)
        return await respond_with(request, generation.builder, outputs, is_stream=generation.is_stream)

    @abstractmethod
    def _parse(self, request: Request, body: bytes, caller: str) -> Generation:
        """Parse and validate a request in the thread pool.

        Args:
            request: has the headers.
            body: the whole body.
            caller: scope of the media uuids.

        Raises:
            RequestError: a field is malformed, invalid or not supported.
        """

    async def _generate(self, generation: Generation) -> Outputs:
        """Yield output deltas; leaving early aborts the request.

        Raises:
            MMLoRAError: the request cannot be served, or failed.
        """
        model, lora, params = generation.model, generation.lora, generation.params
        lora_request = await self._models.find_adapter(model, lora)
        if generation.prompt.media is not None:
            await generation.prompt.media.fetch()
        with self._models.log_failures(model, lora):
            ready = await self._llm.prepare(
                generation.prompt, params, generation.request_id, lora_request, generation.priority
            )
            if params.prompt_logprobs is not None:
                num_tokens = len(ready.input.prompt_token_ids)
                check_prompt_logprobs(num_tokens, params.prompt_logprobs, len(self._llm.tokenizer))
            outputs = self._llm.run(ready)
            try:
                async for output in outputs:
                    raise_failure(output)
                    yield output
            finally:
                await close(outputs)
