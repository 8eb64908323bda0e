"""`TranscriptionService`: one clip from its form to its text, in the language spoken or in another."""

import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mmlora.models.transcription import LANGUAGES, TranscriptionPrompt
from mmlora.processors.media.decoding import load_media
from mmlora.processors.media.items import AudioItem
from mmlora.server.errors import Refusal
from mmlora.server.http.admission import read_body
from mmlora.server.openai.generation import Conversation, Conversations
from mmlora.server.openai.protocol import FieldError
from mmlora.server.openai.streaming import respond_with
from mmlora.server.openai.transcriptions.output import Asked, TranscriptionAnswer
from mmlora.server.openai.transcriptions.protocol import AudioRequest, TranscriptionRequest, TranslationRequest


class TranscriptionService:
    """Answers transcriptions and translations.

    Args:
        conversations: run by the engine.
        max_request_bytes: the largest body.
    """

    def __init__(self, conversations: Conversations, max_request_bytes: int) -> None:
        self._llm = conversations.llm
        self._conversations = conversations
        self._max_request_bytes = max_request_bytes

    async def respond(self, request: Request, kind: type[TranscriptionRequest] | type[TranslationRequest]) -> Response:
        """Serve one HTTP request; when the client leaves, the work stops.

        Raises:
            MMLoRAError: the request cannot be served, or failed before the answer began.
        """
        content_type = request.headers.get("content-type")
        # The body is not kept: what is decoded of it is all that the rest needs.
        conversation, answer, is_stream = await self._llm.run_in_pool(
            self._prepare, kind, content_type, await read_body(request, self._max_request_bytes)
        )
        outputs = self._conversations.generate(conversation, f"transcription-{uuid.uuid4().hex}")
        return await respond_with(request, answer, outputs, is_stream=is_stream)

    def _prepare(
        self, kind: type[TranscriptionRequest] | type[TranslationRequest], content_type: str | None, body: bytes
    ) -> tuple[Conversation, TranscriptionAnswer, bool]:
        asked = kind.parse(content_type, body)
        prompt = self._prompt()
        instruction, language = _instruction(prompt, asked)
        clip = load_media(asked.file, self._llm.media.limits, expected="audio")
        assert isinstance(clip, AudioItem)
        answer = TranscriptionAnswer(
            Asked(
                "translate" if isinstance(asked, TranslationRequest) else "transcribe",
                asked.response_format,
                asked.has_logprobs,
                language,
                clip.duration_s,
                prompt.answer_mark if asked.language is None else None,
            )
        )
        return _conversation(prompt, asked, clip, instruction), answer, asked.stream

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


def _conversation(prompt: TranscriptionPrompt, asked: AudioRequest, clip: AudioItem, instruction: str) -> Conversation:
    """A user's turn with the clip and, unless a template of its own says it all, the text that goes with it."""
    content: list[dict[str, Any]] = [{"type": "audio", "audio": clip}]
    options: dict[str, Any] = {}
    if prompt.chat_template is not None:
        code = asked.language
        language = {"code": code, "name": LANGUAGES[code].title()} if code is not None else None
        options = {"language": language, "context": asked.prompt or ""}
    else:
        text = f"{instruction}\n{asked.prompt}" if asked.prompt else instruction
        content.append({"type": "text", "text": text})
    return Conversation(
        [{"role": "user", "content": content}],
        asked.model,
        asked.lora,
        asked.sampling_options(),
        options,
        chat_template=prompt.chat_template,
        priority=asked.priority,
        cache_salt=asked.cache_salt,
    )
