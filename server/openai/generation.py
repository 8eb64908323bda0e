"""`Conversations`: messages to deltas, for every endpoint that speaks to the model through its chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmlora.async_llm import AsyncLLM
from mmlora.inputs.chat import CheckedMessages, check_messages, load_chat_template, render_chat
from mmlora.processors.fetch.loader import PromptMedia
from mmlora.sampling_params import SamplingParams
from mmlora.server.http.auth import CALLER
from mmlora.server.lora.served_models import LoRAField, ServedModels
from mmlora.server.openai.logprobs import check_prompt_logprobs
from mmlora.server.openai.output import raise_failure
from mmlora.server.openai.streaming import Outputs, close


@dataclass(frozen=True)
class Conversation:
    """What an endpoint asks of the model.

    Attributes:
        messages: as `mmlora.inputs.chat.render_chat` takes them.
        model, lora: the fields of the request.
        sampling_options: fields of `SamplingParams`, on top of the model's own defaults.
        chat_template_kwargs, mm_processor_kwargs: for the template, and for the processor of media.
        add_generation_prompt, continue_final_message: see `mmlora.inputs.chat.render_chat`.
        priority: lower is served earlier.
        cache_salt: caches are shared among requests with the same one.
        chat_template: in place of the engine's.
        tools: OpenAI's, for the template.
    """

    messages: Sequence[Mapping[str, Any]]
    model: str | None
    lora: LoRAField
    sampling_options: Mapping[str, Any]
    chat_template_kwargs: Mapping[str, Any] | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    priority: int = 0
    cache_salt: str | None = None
    chat_template: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None


class Conversations:
    """Runs conversations.

    Attributes:
        llm: the engine.
        models: the names that clients may ask for.

    Raises:
        ConfigError: the engine's `chat_template` is neither a template nor a file.
    """

    def __init__(self, llm: AsyncLLM, models: ServedModels) -> None:
        self.llm = llm
        self.models = models
        self._chat_template = load_chat_template(llm.args.chat_template)

    @property
    def chat_template(self) -> str:
        """The text of the template, or of all that the tokenizer has."""
        template = self._chat_template or self.llm.tokenizer.chat_template or ""
        return template if isinstance(template, str) else "\n".join(template.values())

    async def generate(self, conversation: Conversation, request_id: str) -> Outputs:
        """Yield what is new as it comes; leaving early aborts the request.

        Raises:
            MMLoRAError: the request cannot be served, or failed.
        """
        model, lora = conversation.model, conversation.lora
        params: SamplingParams = self.llm.default_sampling_params(**conversation.sampling_options)
        lora_request = await self.models.find_adapter(model, lora)
        prompt = await self._load(conversation)
        with self.models.log_failures(model, lora):
            ready = await self.llm.prepare(prompt, params, request_id, lora_request, conversation.priority)
            num_tokens = len(ready.input.prompt_token_ids)
            check_prompt_logprobs(num_tokens, params.prompt_logprobs, len(self.llm.tokenizer))
            outputs = self.llm.run(ready)
            try:
                async for output in outputs:
                    raise_failure(output)
                    yield output
            finally:
                await close(outputs)

    async def _load(self, conversation: Conversation) -> dict[str, Any]:
        """The prompt, its media fetched and decoded."""
        media = self.llm.media.begin(CALLER.get())
        checked = await self.llm.run_in_pool(self._check, conversation)
        await media.fetch(checked.media)
        return await self.llm.run_in_pool(self._render, conversation, checked, media)

    def _check(self, conversation: Conversation) -> CheckedMessages:
        return check_messages(conversation.messages, self.llm.processor, self.llm.args.limit_mm_per_prompt)

    def _render(self, conversation: Conversation, checked: CheckedMessages, media: PromptMedia) -> dict[str, Any]:
        prompt = render_chat(
            checked,
            self.llm.tokenizer,
            self.llm.processor,
            chat_template=conversation.chat_template or self._chat_template,
            chat_template_kwargs=conversation.chat_template_kwargs,
            media=media,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            max_model_len=self.llm.max_model_len,
            tools=conversation.tools,
        )
        options = {"mm_processor_kwargs": conversation.mm_processor_kwargs, "cache_salt": conversation.cache_salt}
        return {**prompt, **options}
