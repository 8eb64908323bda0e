"""`ResponsesService`: OpenAI's Responses API."""

from starlette.requests import Request

from mmlora.async_llm import AsyncLLM
from mmlora.server.lora.served_models import ServedModels
from mmlora.server.observability.request_id import response_ids
from mmlora.server.openai.generation import Generation, GenerationService
from mmlora.server.openai.model_format import ModelFormat
from mmlora.server.openai.responses.input import as_messages
from mmlora.server.openai.responses.items import OutputItems
from mmlora.server.openai.responses.output import ResponseObjectBuilder
from mmlora.server.openai.responses.protocol import ResponsesRequest


class ResponsesService(GenerationService):
    """Serves requests for responses; none is stored.

    Args:
        llm, models, max_request_bytes: see `GenerationService`.
        model_format: how the model writes reasoning and tool calls.
    """

    FIELDS = {"messages": "input", "logprobs": "top_logprobs"}

    def __init__(self, llm: AsyncLLM, models: ServedModels, max_request_bytes: int, model_format: ModelFormat) -> None:
        super().__init__(llm, models, max_request_bytes)
        self._model_format = model_format
        self._defaults = llm.default_sampling_params()

    def _parse(self, request: Request, body: bytes, caller: str) -> Generation:
        fields = ResponsesRequest.parse(body)
        messages = as_messages(fields.instructions, fields.input)
        form = self._model_format.read(fields)
        prompt = self._llm.input_processor.chat_prompt(
            messages,
            chat_template_kwargs=form.template_variables,
            tools=form.tools,
            mm_processor_kwargs=fields.mm_processor_kwargs,
            cache_salt=fields.cache_salt,
            caller=caller,
            is_strict=True,
        )
        response_id, request_id = response_ids(request, "resp_", fields.request_id)
        items = OutputItems(form)
        name = fields.model or self._models.base_name
        builder = ResponseObjectBuilder(response_id, name, fields, self._defaults, items)
        params = self._llm.default_sampling_params(**form.sampling_options)
        return Generation(fields, {request_id: prompt}, prompt.media, params, builder)
