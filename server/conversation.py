"""`Conversations`: messages to deltas, for every endpoint that speaks to the model through its chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmlora.async_llm import AsyncLLM
from mmlora.chat import load_chat_template, render_chat
from mmlora.sampling_params import SamplingParams
from mmlora.server.answers import raise_failure
from mmlora.server.lora_field import LoRAField
from mmlora.server.models import ServedModels
from mmlora.server.streaming import Outputs, adapter_faults, close


@dataclass(frozen=True)
class Conversation:
    """What an endpoint asks of the model.

    Attributes:
        messages: as `mmlora.chat.render_chat` takes them.
        model, lora: the fields of the request.
        sampling_options: fields of `SamplingParams`, on top of the model's own defaults.
        chat_template_kwargs, mm_processor_kwargs: for the template, and for the processor of media.
        tools: OpenAI's, for the template.
    """

    messages: Sequence[Mapping[str, Any]]
    model: str | None
    lora: LoRAField
    sampling_options: Mapping[str, Any]
    chat_template_kwargs: Mapping[str, Any] | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None


class Conversations:
    """Runs conversations.

    Args:
        llm: the engine.
        models: the names that clients may ask for.

    Raises:
        ConfigError: the engine's `chat_template` is neither a template nor a file.
    """

    def __init__(self, llm: AsyncLLM, models: ServedModels) -> None:
        self._llm = llm
        self._models = models
        self._chat_template = load_chat_template(llm.engine.args.chat_template)

    @property
    def chat_template(self) -> str:
        """The text of the template, or of all that the tokenizer has."""
        template = self._chat_template or self._llm.tokenizer.chat_template or ""
        return template if isinstance(template, str) else "\n".join(template.values())

    async def generate(self, conversation: Conversation, request_id: str) -> Outputs:
        """Yield what is new as it comes; leaving early aborts the request.

        Raises:
            MMLoRAError: the request cannot be served, or failed.
        """
        model, lora = conversation.model, conversation.lora
        params: SamplingParams = self._llm.engine.default_sampling_params(**conversation.sampling_options)
        lora_request = await self._models.find(model, lora)
        prompt = await self._llm.run_in_pool(self._render, conversation)
        outputs = self._llm.generate(prompt, params, request_id, lora_request)
        try:
            with adapter_faults(self._models, model, lora):
                async for output in outputs:
                    raise_failure(output)
                    yield output
        finally:
            await close(outputs)

    def _render(self, conversation: Conversation) -> dict[str, Any]:
        engine = self._llm.engine
        prompt = render_chat(
            conversation.messages,
            engine.tokenizer,
            engine.parts.inputs.processor,
            chat_template=self._chat_template,
            chat_template_kwargs=conversation.chat_template_kwargs,
            limit_mm_per_prompt=engine.args.limit_mm_per_prompt,
            max_model_len=engine.max_model_len,
            tools=conversation.tools,
        )
        return {**prompt, "mm_processor_kwargs": conversation.mm_processor_kwargs}
