"""`TranscriptionService`: transcriptions and translations of speech."""

from typing import Any

from starlette.requests import Request

from mmlora.async_llm import AsyncLLM
from mmlora.errors import RequestError
from mmlora.models.transcription import LANGUAGES, TranscriptionPrompt
from mmlora.server.errors import Refusal
from mmlora.server.lora.served_models import ServedModels
from mmlora.server.observability.request_id import response_ids
from mmlora.server.openai.generation import Generation, GenerationService
from mmlora.server.openai.transcriptions.output import TranscriptionBuilder
from mmlora.server.openai.transcriptions.protocol import AudioRequest, TranscriptionRequest, TranslationRequest


class TranscriptionService(GenerationService):
    """Serves transcriptions or translations.

    Args:
        llm, models, max_request_bytes: see `GenerationService`.
        kind: request model of the endpoint.
    """

    FIELDS = {"messages": "file"}
    TAKES_JSON = False

    def __init__(
        self,
        llm: AsyncLLM,
        models: ServedModels,
        max_request_bytes: int,
        kind: type[TranscriptionRequest] | type[TranslationRequest],
    ) -> None:
        super().__init__(llm, models, max_request_bytes)
        self._kind = kind

    def _parse(self, request: Request, body: bytes, caller: str) -> Generation:
        form = self._kind.parse(request.headers.get("content-type"), body)
        prompt = self._prompt()
        instruction, language = _instruction(prompt, form)
        # One user message: the clip, and the instruction unless the template adds it.
        content: list[dict[str, Any]] = [{"type": "audio", "audio": form.file}]
        template_kwargs: dict[str, Any] = {}
        if prompt.chat_template is not None:
            code = form.language
            spoken = {"code": code, "name": LANGUAGES[code].title()} if code is not None else None
            template_kwargs = {"language": spoken, "context": form.prompt or ""}
        else:
            text = f"{instruction}\n{form.prompt}" if form.prompt else instruction
            content.append({"type": "text", "text": text})
        chat = self._llm.input_processor.chat_prompt(
            [{"role": "user", "content": content}],
            chat_template=prompt.chat_template,
            chat_template_kwargs=template_kwargs,
            cache_salt=form.cache_salt,
            caller=caller,
        )
        assert chat.media is not None
        separator = prompt.language_separator if form.language is None else None
        builder = TranscriptionBuilder(form, chat.media, language, separator)
        params = self._llm.default_sampling_params(**form.sampling_options())
        _, request_id = response_ids(request, "transcription-")
        return Generation(form, {request_id: chat}, chat.media, params, builder)

    def _prompt(self) -> TranscriptionPrompt:
        """Return the model's prompts for transcription.

        Raises:
            Refusal: the model does not support audio or transcription.
        """
        name, processor, prompt = self._llm.model_name, self._llm.processor, self._llm.transcription_prompt
        modalities = processor.modalities if processor is not None else frozenset()
        if prompt is None or "audio" not in modalities:
            supported = ", ".join(sorted(modalities)) or "text only"
            raise _no_model(f"the model {name!r} does not support transcription; it supports {supported}")
        token, tokenizer = prompt.special_token, self._llm.tokenizer
        if token is not None and tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise _no_model(f"the tokenizer of {name!r} lacks the token {token!r}, which transcription needs")
        return prompt


def _no_model(message: str) -> Refusal:
    return Refusal(400, message, param="model", code="transcription_not_supported")


def _instruction(prompt: TranscriptionPrompt, form: AudioRequest) -> tuple[str, str | None]:
    """Return the instruction after the clip, and the English name of the output's language if it is known.

    Raises:
        RequestError: the model does not support a field or its value.
        Refusal: the model does not translate.
    """
    supported = prompt.languages or tuple(LANGUAGES)
    if form.language is not None and form.language not in supported:
        message = f"language={form.language!r} is not supported by this model; it must be one of {', '.join(supported)}"
        raise RequestError(message, "language")
    if form.prompt and not prompt.takes_context:
        raise RequestError("prompt is not supported: this model's transcription prompt is fixed", "prompt")
    if isinstance(form, TranslationRequest):
        if prompt.translate is None:
            raise _no_model("this model was not trained to translate speech; use /v1/audio/transcriptions")
        if "{to_language}" not in prompt.translate and form.to_language != "en":
            raise RequestError(f"to_language={form.to_language!r} is not supported; allowed is en", "to_language")
        name = LANGUAGES[form.to_language]
        return prompt.translate.replace("{to_language}", name.title()), name
    if form.language is None:
        return prompt.transcribe, LANGUAGES[supported[0]] if len(supported) == 1 else None
    name = LANGUAGES[form.language]
    return (prompt.transcribe_in or prompt.transcribe).replace("{language}", name.title()), name
