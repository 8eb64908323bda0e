"""`ChatService`: one chat completion from its body to its answer, whole or streamed."""

import functools
import uuid

from starlette.requests import Request
from starlette.responses import Response

from mmlora.inputs.chat import message_text
from mmlora.server.http.admission import read_body
from mmlora.server.openai.chat.output import ChatAnswer
from mmlora.server.openai.chat.protocol import ChatCompletionRequest, parse_chat_request
from mmlora.server.openai.generation import Conversation, Conversations
from mmlora.server.openai.streaming import respond_with
from mmlora.server.openai.tools.calling import ToolCalling


class ChatService:
    """Answers chat completions.

    Args:
        conversations: run by the engine.
        max_request_bytes: the largest body.
        tool_calling: of the model.
    """

    def __init__(self, conversations: Conversations, max_request_bytes: int, tool_calling: ToolCalling) -> None:
        self._conversations = conversations
        self._max_request_bytes = max_request_bytes
        self._tool_calling = tool_calling

    async def respond(self, request: Request) -> Response:
        """Serve one HTTP request; when the client leaves, the work stops.

        Raises:
            MMLoRAError: the request cannot be served, or failed before the answer began.
        """
        body = await read_body(request, self._max_request_bytes)
        chat = await self._conversations.llm.run_in_pool(parse_chat_request, body)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        model = chat.model or self._conversations.models.base_name
        answer = ChatAnswer(
            request_id,
            model,
            _top_logprobs(chat),
            chat.prompt_logprobs,
            front=_repeated(chat),
            include_usage=chat.include_usage,
            new_parser=functools.partial(self._tool_calling.new_parser, chat.tooling),
            new_call_id=self._tool_calling.new_call_id,
        )
        conversation = Conversation(
            chat.messages,
            chat.model,
            chat.lora,
            {**chat.sampling_options(), **self._tool_calling.sampling_options(chat.tooling)},
            chat.chat_template_kwargs,
            chat.mm_processor_kwargs,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=bool(chat.continue_final_message),
            priority=chat.priority or 0,
            cache_salt=chat.cache_salt,
            tools=list(chat.tooling.tools.values()),
        )
        outputs = self._conversations.generate(conversation, request_id)
        return await respond_with(request, answer, outputs, is_stream=bool(chat.stream))


def _repeated(chat: ChatCompletionRequest) -> str:
    """What `echo` puts before the answer: the last message, if that is the assistant's too."""
    last = chat.messages[-1]
    return message_text(last) if chat.echo and last["role"] == "assistant" else ""


def _top_logprobs(chat: ChatCompletionRequest) -> int | None:
    return chat.top_logprobs or 0 if chat.logprobs else None
