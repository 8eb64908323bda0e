"""`ResponsesService`: OpenAI's Responses API."""

import uuid

from starlette.requests import Request

from mmlora.async_llm import AsyncLLM
from mmlora.server.lora.served_models import ServedModels
from mmlora.server.openai.generation import Generation, GenerationService
from mmlora.server.openai.responses.input import as_messages
from mmlora.server.openai.responses.items import OutputItems
from mmlora.server.openai.responses.output import ResponseObjectBuilder
from mmlora.server.openai.responses.protocol import ResponsesRequest
from mmlora.server.openai.tools.choice import ToolCalling


class ResponsesService(GenerationService):
    """Serves requests for responses; none is stored.

    Args:
        llm, models, max_request_bytes: see `GenerationService`.
        tool_calling: how the model calls tools.
    """

    FIELDS = {"messages": "input", "logprobs": "top_logprobs"}

    def __init__(self, llm: AsyncLLM, models: ServedModels, max_request_bytes: int, tool_calling: ToolCalling) -> None:
        super().__init__(llm, models, max_request_bytes)
        self._tool_calling = tool_calling
        self._defaults = llm.default_sampling_params()

    def _parse(self, request: Request, body: bytes, caller: str) -> Generation:
        fields = ResponsesRequest.parse(body)
        messages = as_messages(fields.instructions, fields.input)
        options, tools, parser = fields.sampling_options(), None, None
        if fields.tooling is not None:
            options |= self._tool_calling.sampling_options(fields.tooling)
            tools = list(fields.tooling.tools.values())
            skips = fields.skip_special_tokens is not False
            parser = self._tool_calling.new_parser(fields.tooling, skips_special_tokens=skips)
        prompt = self._llm.input_processor.chat_prompt(
            messages,
            chat_template_kwargs=fields.chat_template_kwargs,
            tools=tools,
            mm_processor_kwargs=fields.mm_processor_kwargs,
            cache_salt=fields.cache_salt,
            caller=caller,
            is_strict=True,
        )
        request_id = f"resp_{uuid.uuid4().hex}"
        items = OutputItems(parser, self._tool_calling.new_call_id)
        name = fields.model or self._models.base_name
        builder = ResponseObjectBuilder(request_id, name, fields, self._defaults, items)
        params = self._llm.default_sampling_params(**options)
        return Generation(fields, {request_id: prompt}, prompt.media, params, builder)
