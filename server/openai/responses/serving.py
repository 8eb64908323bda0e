"""`ResponsesService`: one response of OpenAI's Responses API from its body to its answer, whole or streamed."""

import uuid

from starlette.requests import Request
from starlette.responses import Response

from mmlora.server.http.admission import read_body
from mmlora.server.openai.generation import Conversation, Conversations
from mmlora.server.openai.responses.input import as_messages
from mmlora.server.openai.responses.items import OutputItems
from mmlora.server.openai.responses.output import ResponsesAnswer
from mmlora.server.openai.responses.protocol import ResponsesRequest
from mmlora.server.openai.streaming import respond_with
from mmlora.server.openai.tools.calling import ToolCalling


class ResponsesService:
    """Answers requests for responses; none is kept.

    Args:
        conversations: run by the engine.
        max_request_bytes: the largest body.
        tool_calling: of the model.
    """

    def __init__(self, conversations: Conversations, max_request_bytes: int, tool_calling: ToolCalling) -> None:
        self._conversations = conversations
        self._max_request_bytes = max_request_bytes
        self._tool_calling = tool_calling
        self._defaults = conversations.llm.default_sampling_params()

    async def respond(self, request: Request) -> Response:
        """Serve one HTTP request; when the client leaves, the work stops.

        Raises:
            MMLoRAError: the request cannot be served, or failed before the answer began.
        """
        body = await read_body(request, self._max_request_bytes)
        asked, conversation = await self._conversations.llm.run_in_pool(self._read, body)
        request_id = f"resp_{uuid.uuid4().hex}"
        items = OutputItems(self._tool_calling.new_parser(asked.tooling), self._tool_calling.new_call_id)
        answer = ResponsesAnswer(
            request_id, asked.model or self._conversations.models.base_name, asked, self._defaults, items
        )
        outputs = self._conversations.generate(conversation, request_id)
        return await respond_with(request, answer, outputs, is_stream=bool(asked.stream))

    def _read(self, body: bytes) -> tuple[ResponsesRequest, Conversation]:
        asked = ResponsesRequest.parse(body)
        conversation = Conversation(
            as_messages(asked.instructions, asked.input),
            asked.model,
            asked.lora,
            {**asked.sampling_options(), **self._tool_calling.sampling_options(asked.tooling)},
            asked.chat_template_kwargs,
            asked.mm_processor_kwargs,
            priority=asked.priority or 0,
            cache_salt=asked.cache_salt,
            tools=list(asked.tooling.tools.values()),
        )
        return asked, conversation
