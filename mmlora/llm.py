"""`LLM`: offline inference in the caller's thread."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from tqdm.auto import tqdm

from mmlora.config import EngineArgs
from mmlora.engine.llm_engine import LLMEngine, LoRAMethods
from mmlora.errors import EngineInUseError, RequestError
from mmlora.inputs.chat_template import Message
from mmlora.inputs.engine_input import EngineInput
from mmlora.inputs.input_processor import Prompt
from mmlora.lora.request import LoRARequest
from mmlora.lora.store.manager import LoRAManager
from mmlora.outputs import RequestOutput
from mmlora.sampling_params import SamplingParams
from mmlora.utils.text import shorten

T = TypeVar("T")
# Methods of vLLM's `LLM` that this one does not have.
UNSUPPORTED_METHODS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("encode", "embed", "classify", "score", "reward"), "mmlora generates text"),
    "beam_search": "use n=… and the cumulative_logprob of the completions",
    **dict.fromkeys(("sleep", "wake_up", "collective_rpc", "apply_model"), "the engine runs in this process"),
}


class LLM(LoRAMethods):
    """Offline inference on one base model with many adapters; `LoRAManager` documents the `…_lora` methods.

    Several threads may share one `LLM`: their calls of `generate` and `chat` run one after the other, in the order in
    which they came. `AsyncLLM` runs concurrent requests together.

    Args:
        model: directory or Hub id.
        options: fields of `mmlora.config.EngineArgs`, for example `enable_lora`, `default_mm_loras`, `max_loras`,
            `max_lora_rank`, `max_model_len`, `limit_mm_per_prompt`, `dtype`, `device`.

    Raises:
        ConfigError: an option is unknown or does not fit the model.
        AdapterError: a default adapter cannot be loaded.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.llm_engine = LLMEngine(EngineArgs.from_kwargs(model, **options))
        self._ids = itertools.count()

    def get_tokenizer(self) -> Any:
        """Return the model's `transformers` tokenizer."""
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters of the model's `generation_config.json`."""
        return self.llm_engine.default_sampling_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: LoRARequest | object | Sequence[LoRARequest | object | None] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: int | Sequence[int] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
            prompts: one prompt or a list of them: text, token ids, or a mapping (`TextPrompt`, `TokensPrompt`) with
                `prompt` or `prompt_token_ids`, `multi_modal_data` (`{"audio": (array, rate) | [...], "image": PIL}`),
                `mm_processor_kwargs` and `cache_salt` (prompts share caches only under the same salt).
            sampling_params: one for all, or one per prompt; by default those of the model.
            lora_request: one for all, or one per prompt. `None` selects the adapter by the modalities of the
                prompt; `BASE` is the base model.
            use_tqdm: whether to show a progress bar, or a function that creates one.
            priority: one for all, or one per prompt, by default 0; lower is served earlier. Needs
                `scheduling_policy="priority"`.
            prompt_token_ids: token ids of one prompt, or of each prompt, instead of `prompts`.

        Returns:
            One output per prompt, in order. A request that failed while running has `error` set.

        Raises:
            RequestError: a prompt cannot be served; no prompt was started.
            EngineInUseError: it is called from inside another call, in a fork of the process that created the `LLM`, or
                while requests of `llm_engine.add_request` are unfinished.
        """
        self.llm_engine.lock.check_process()  # before work in threads, which a fork does not have
        if (prompts is None) is (prompt_token_ids is None):
            raise RequestError("give either prompts or prompt_token_ids")
        batch = _as_prompts(prompts if prompt_token_ids is None else prompt_token_ids)
        params = [_with_whole_outputs(p) for p in _one_per_prompt(sampling_params, len(batch), "sampling_params")]
        loras = _one_per_prompt(lora_request, len(batch), "lora_request")
        priorities = _one_per_prompt(0 if priority is None else priority, len(batch), "priority")
        self.llm_engine.prefetch_loras(loras)
        inputs = [
            self.llm_engine.process_input(str(next(self._ids)), prompt, param, lora, prompt_priority)
            for prompt, param, lora, prompt_priority in zip(batch, params, loras, priorities, strict=True)
        ]
        return self._run(inputs, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequest | object | Sequence[LoRARequest | object | None] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        priority: int | Sequence[int] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_content_format: str = "auto",
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation, or of each in a list.

        Args:
            messages: OpenAI-style, with parts `text`, `image_url`, `input_audio`, `audio_url`, `image` and `audio` (a
                URL, a path, base64, a PIL image or `(array, rate)`).
            sampling_params, use_tqdm, lora_request, priority: as in `generate`.
            chat_template: used instead of the model's template.
            add_generation_prompt: whether the prompt ends with the start of an assistant message; by default it does,
                unless the final message is continued.
            chat_template_kwargs: passed to the template.
            mm_processor_kwargs: options of the media processor.
            continue_final_message: leave the final message open, so that the output continues it.
            tools: in OpenAI's format, passed to the template; tool calls in the output are not parsed.
            chat_template_content_format: only `auto`: the format is detected from the template.

        Raises:
            RequestError: a conversation cannot be served; no conversation was started.
        """
        if chat_template_content_format != "auto":
            received = f"chat_template_content_format={shorten(chat_template_content_format)}"
            raise RequestError(f"{received} must be 'auto': the format is detected from the template")
        if not messages:
            raise RequestError("messages must be a list of at least one message")
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = [
            self.llm_engine.input_processor.chat_prompt(
                conversation,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                mm_processor_kwargs=mm_processor_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, lora_request, use_tqdm, priority)

    @property
    def lora(self) -> LoRAManager:
        """See `LoRAMethods.lora`."""
        return self.llm_engine.lora

    def between_steps(self, function: Callable[[], None]) -> None:
        """See `LoRAMethods.between_steps`."""
        self.llm_engine.between_steps(function)

    def __getattr__(self, name: str) -> Any:
        if name in UNSUPPORTED_METHODS:
            raise AttributeError(f"LLM.{name} is not supported: {UNSUPPORTED_METHODS[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _run(self, inputs: Sequence[EngineInput], use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        engine, request_ids = self.llm_engine, [request_input.request_id for request_input in inputs]
        with engine.lock.session():
            if engine.has_unfinished_requests:
                raise EngineInUseError("requests of LLMEngine.add_request are unfinished; step until they are finished")
            try:
                for request_input in inputs:
                    engine.add_input(request_input)
                finished = self._step_until_finished(len(inputs), use_tqdm)
            except BaseException:  # for example Ctrl-C: the next call starts without leftovers
                engine.lock.end_call()
                for request_id in request_ids:
                    engine.abort_request(request_id)
                raise
        return [finished[request_id] for request_id in request_ids]

    def _step_until_finished(self, count: int, use_tqdm: bool | Callable[..., Any]) -> dict[str, RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        bar = use_tqdm if callable(use_tqdm) else tqdm
        with bar(total=count, disable=not use_tqdm, desc="Processed prompts") as progress:
            while self.llm_engine.has_unfinished_requests:
                for output in self.llm_engine.step():
                    if output.finished:
                        finished[output.request_id] = output
                        progress.update()
        return finished


def _as_prompts(prompts: Any) -> list[Prompt]:
    """Return a list of prompts; a list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts is a {type(prompts).__name__}; it must be a prompt or a list of prompts")
    if prompts and all(isinstance(token, int) for token in prompts):
        return [prompts]
    return list(prompts)


def _with_whole_outputs(params: Any) -> Any:
    """Return sampling parameters whose finished output holds everything; `LLM` returns nothing else."""
    if isinstance(params, SamplingParams) and params.output_kind is not None:
        return replace(params, output_kind=None)
    return params


def _one_per_prompt(value: T | Sequence[T] | None, count: int, name: str) -> list[Any]:
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise RequestError(f"{name} has {len(value)} entries for {count} prompts; give one, or one per prompt")
        return list(value)
    return [value] * count
