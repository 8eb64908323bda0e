"""`ChatService`: chat completions."""

from starlette.requests import Request

from mmlora.async_llm import AsyncLLM
from mmlora.inputs.chat import text_of
from mmlora.server.lora.served_models import ServedModels
from mmlora.server.observability.request_id import response_ids
from mmlora.server.openai.chat.output import ChatCompletionBuilder
from mmlora.server.openai.chat.protocol import parse_chat_request
from mmlora.server.openai.generation import Generation, GenerationService
from mmlora.server.openai.model_format import ModelFormat


class ChatService(GenerationService):
    """Serves chat completions.

    Args:
        llm, models, max_request_bytes: see `GenerationService`.
        model_format: how the model writes reasoning and tool calls.
    """

    FIELDS = {"logprobs": "top_logprobs"}

    def __init__(self, llm: AsyncLLM, models: ServedModels, max_request_bytes: int, model_format: ModelFormat) -> None:
        super().__init__(llm, models, max_request_bytes)
        self._model_format = model_format

    def _parse(self, request: Request, body: bytes, caller: str) -> Generation:
        chat = parse_chat_request(body)
        form = self._model_format.read(chat)
        prompt = self._llm.input_processor.chat_prompt(
            chat.messages,
            chat_template_kwargs=form.template_variables,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=bool(chat.continue_final_message),
            tools=form.tools,
            mm_processor_kwargs=chat.mm_processor_kwargs,
            cache_salt=chat.cache_salt,
            add_special_tokens=bool(chat.add_special_tokens),
            caller=caller,
            is_strict=True,
        )
        response_id, request_id = response_ids(request, "chatcmpl-", chat.request_id)
        is_echo = bool(chat.echo) and chat.messages[-1]["role"] == "assistant"
        prefix = text_of(prompt.turns[-1]) if is_echo else ""
        name = chat.model or self._models.base_name
        builder = ChatCompletionBuilder(response_id, name, chat, form, prefix=prefix)
        params = self._llm.default_sampling_params(**form.sampling_options)
        return Generation(chat, {request_id: prompt}, prompt.media, params, builder)
