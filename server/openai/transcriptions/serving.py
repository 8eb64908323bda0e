"""`TranscriptionService`: one clip from its form to its text, in the language spoken or in another."""

import uuid
from typing import Any

from starlette.requests import Request

from mmlora.async_llm import AsyncLLM
from mmlora.models.transcription import LANGUAGES, TranscriptionPrompt
from mmlora.processors.media.decoding import load_media
from mmlora.processors.media.items import AudioItem
from mmlora.server.bodies import FieldError
from mmlora.server.errors import Refusal
from mmlora.server.lora.served_models import ServedModels
from mmlora.server.openai.generation import Generation, GenerationService
from mmlora.server.openai.transcriptions.output import Asked, TranscriptionBuilder
from mmlora.server.openai.transcriptions.protocol import AudioRequest, TranscriptionRequest, TranslationRequest


class TranscriptionService(GenerationService):
    """Serves transcriptions or translations.

    Args:
        llm, models, max_request_bytes: see `GenerationService`.
        kind: the form of the requests.
    """

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
        asked = self._kind.parse(request.headers.get("content-type"), body)
        prompt = self._prompt()
        instruction, language = _instruction(prompt, asked)
        clip = load_media(asked.file, self._llm.media.limits, expected="audio")
        assert isinstance(clip, AudioItem)
        builder = TranscriptionBuilder(
            Asked(
                "translate" if isinstance(asked, TranslationRequest) else "transcribe",
                asked.response_format,
                asked.has_logprobs,
                language,
                clip.duration_s,
                prompt.language_separator if asked.language is None else None,
            )
        )
        # A user message with the clip and, unless the template says it all, the text that goes with it.
        content: list[dict[str, Any]] = [{"type": "audio", "audio": clip}]
        template_kwargs: dict[str, Any] = {}
        if prompt.chat_template is not None:
            code = asked.language
            spoken = {"code": code, "name": LANGUAGES[code].title()} if code is not None else None
            template_kwargs = {"language": spoken, "context": asked.prompt or ""}
        else:
            text = f"{instruction}\n{asked.prompt}" if asked.prompt else instruction
            content.append({"type": "text", "text": text})
        return Generation(
            f"transcription-{uuid.uuid4().hex}",
            asked.model,
            asked.lora,
            self._llm.input_processor.chat_prompt(
                [{"role": "user", "content": content}],
                chat_template=prompt.chat_template,
                chat_template_kwargs=template_kwargs,
                cache_salt=asked.cache_salt,
                caller=caller,
            ),
            self._llm.default_sampling_params(**asked.sampling_options()),
            builder,
            is_stream=asked.stream,
            priority=asked.priority,
        )

    def _prompt(self) -> TranscriptionPrompt:
        """How the model is asked.

        Raises:
            Refusal: it does not hear, or cannot be asked.
        """
        name, processor, prompt = self._llm.model_name, self._llm.processor, self._llm.transcription_prompt
        modalities = processor.modalities if processor is not None else frozenset()
        if prompt is None or "audio" not in modalities:
            takes = ", ".join(sorted(modalities)) or "text only"
            raise _no_model(f"the model {name!r} cannot be asked for a transcription; it takes {takes}")
        token, tokenizer = prompt.special_token, self._llm.tokenizer
        if token is not None and tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise _no_model(f"the tokenizer of {name!r} lacks the token {token!r}, which asks for a transcription")
        return prompt


def _no_model(message: str) -> Refusal:
    return Refusal(400, message, param="model", code="transcription_not_supported")


def _instruction(prompt: TranscriptionPrompt, asked: AudioRequest) -> tuple[str, str | None]:
    """The text that goes with the clip, and the English name of the answer's language, where it is known.

    Raises:
        FieldError: the model was not taught what is asked for.
        Refusal: it does not translate.
    """
    heard = prompt.languages or tuple(LANGUAGES)
    if asked.language is not None and asked.language not in heard:
        message = f"language={asked.language!r} is not one that this model hears; allowed are {', '.join(heard)}"
        raise FieldError(message, "language")
    if asked.prompt and not prompt.takes_context:
        raise FieldError("prompt is not supported: what this model is asked has no place for it", "prompt")
    if isinstance(asked, TranslationRequest):
        if prompt.translate is None:
            raise _no_model("this model was not taught to translate speech; it can be asked for a transcription")
        if "{to_language}" not in prompt.translate and asked.to_language != "en":
            raise FieldError(f"to_language={asked.to_language!r} is not supported; allowed is en", "to_language")
        name = LANGUAGES[asked.to_language]
        return prompt.translate.replace("{to_language}", name.title()), name
    if asked.language is None:
        return prompt.transcribe, LANGUAGES[heard[0]] if len(heard) == 1 else None
    name = LANGUAGES[asked.language]
    return (prompt.transcribe_in or prompt.transcribe).replace("{language}", name.title()), name
