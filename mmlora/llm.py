"""`LLM`: offline inference in the caller's thread."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm

from mmlora.chat import Message, load_chat_template, render_chat
from mmlora.config import EngineArgs
from mmlora.engine import LLMEngine
from mmlora.errors import RequestError
from mmlora.inputs import Prompt
from mmlora.lora.request import LoRARequest
from mmlora.outputs import RequestOutput
from mmlora.sampling_params import SamplingParams

T = TypeVar("T")


class LLM:
    """One base model with many adapters, for batches of prompts.

    Args:
        model: directory or Hub id.
        options: the fields of `mmlora.config.EngineArgs`, among them `enable_lora`, `default_mm_loras`, `max_loras`,
            `max_lora_rank`, `max_model_len`, `limit_mm_per_prompt`, `dtype`, `device`.

    Raises:
        ConfigError: an option is unknown or does not fit the model.
        AdapterError: a default adapter cannot be loaded.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.llm_engine = LLMEngine(EngineArgs.from_kwargs(model, **options))
        self._chat_template = load_chat_template(self.llm_engine.args.chat_template)
        self._ids = itertools.count()

    def get_tokenizer(self) -> Any:
        """The model's `transformers` tokenizer."""
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Sampling parameters that the model's `generation_config.json` asks for."""
        return self.llm_engine.default_sampling_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: LoRARequest | object | Sequence[LoRARequest | object | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
            prompts: one prompt or a list of them: text, token ids, or a mapping with `prompt` or
                `prompt_token_ids`, `multi_modal_data` (`{"audio": (array, rate) | [...], "image": PIL | [...]}`)
                and `mm_processor_kwargs`.
            sampling_params: one for all, or one per prompt; by default the model's own.
            lora_request: one for all, or one per prompt (`None` and `BASE` allowed). `None` lets the media decide,
                `BASE` is the base model on purpose.
            use_tqdm: show progress.

        Returns:
            One output per prompt, in order. A request that failed while it ran has `error` set.

        Raises:
            RequestError: a prompt cannot be served; none of them was started.
        """
        batch = _as_prompts(prompts)
        params = _one_per_prompt(sampling_params, len(batch), "sampling_params")
        loras = _one_per_prompt(lora_request, len(batch), "lora_request")
        inputs = [
            self.llm_engine.process_input(str(next(self._ids)), prompt, param, lora)
            for prompt, param, lora in zip(batch, params, loras, strict=True)
        ]
        for request_input in inputs:
            self.llm_engine.add_input(request_input)
        return self._run([request_input.request_id for request_input in inputs], use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | object | Sequence[LoRARequest | object | None] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them.

        Args:
            messages: OpenAI-style, with parts `text`, `image_url`, `input_audio`, `audio_url` (data: URLs), `image`
                (PIL) and `audio` (`(array, rate)`).
            sampling_params, use_tqdm, lora_request: as in `generate`.
            chat_template: in place of the model's own.
            add_generation_prompt: end with the start of the assistant's turn.
            chat_template_kwargs: passed to the template.
            mm_processor_kwargs: options of the media processor.

        Raises:
            RequestError: a conversation cannot be served; none of them was started.
        """
        if not messages:
            raise RequestError("messages must be a list of at least one message")
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = []
        for conversation in conversations:
            prompt = render_chat(
                conversation,
                self.llm_engine.tokenizer,
                self.llm_engine.parts.inputs.processor,
                chat_template=load_chat_template(chat_template) or self._chat_template,
                chat_template_kwargs=chat_template_kwargs,
                add_generation_prompt=add_generation_prompt,
                limit_mm_per_prompt=self.llm_engine.args.limit_mm_per_prompt,
                max_model_len=self.llm_engine.max_model_len,
            )
            prompts.append({**prompt, "mm_processor_kwargs": mm_processor_kwargs})
        return self.generate(prompts, sampling_params, lora_request, use_tqdm)

    def _run(self, request_ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        with tqdm(total=len(request_ids), disable=not use_tqdm, desc="Processed prompts") as progress:
            try:
                while len(finished) < len(request_ids):
                    for output in self.llm_engine.step():
                        if output.finished:
                            finished[output.request_id] = output
                            progress.update()
            except BaseException:  # Ctrl-C, for one: the next call starts clean
                for request_id in request_ids:
                    self.llm_engine.abort_request(request_id)
                raise
        return [finished[request_id] for request_id in request_ids]


def _as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list; a list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts is a {type(prompts).__name__}; it must be a prompt or a list of prompts")
    if prompts and all(isinstance(token, int) for token in prompts):
        return [prompts]
    return list(prompts)


def _one_per_prompt(value: T | Sequence[T] | None, count: int, name: str) -> list[Any]:
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise RequestError(f"{name} has {len(value)} entries for {count} prompts; give one, or one per prompt")
        return list(value)
    return [value] * count
