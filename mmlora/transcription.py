"""`TranscriptionPrompt`: how a model is asked for the words of a clip, in the language spoken or in another.

Sources are the model cards, and for Qwen3-ASR, Audio Flamingo 3 and Voxtral the processors of `transformers`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers.models.whisper.tokenization_whisper import LANGUAGES as WHISPER_LANGUAGES

from mmlora.errors import ConfigError

LANGUAGES: Final[Mapping[str, str]] = WHISPER_LANGUAGES  # English names by ISO 639-1 code, in small letters
OWN_PROMPT: Final = "transcription_prompt"  # in a checkpoint's generation_config.json


@dataclass(frozen=True)
class TranscriptionPrompt:
    """What a user says to have a clip transcribed or translated.

    Attributes:
        transcribe: text that follows the clip.
        transcribe_in: the same where the request tells which `{language}` is spoken; None where the model was taught
            no such text.
        translate: text that follows the clip to have it in `{to_language}`; None where the model was not taught to.
        languages: codes of those that the model hears, where these are few; empty for all of `LANGUAGES`.
        context_role: whose turn holds what else a request wants the model to know; None where nobody's does.
        prefill: what the answer begins with where the request tells which `{language}` is spoken.
        answer_mark: what stands in an answer between the language heard and the text, unless there is a `prefill`.
        chat_template: for these prompts, in place of the model's; it may use `language`, a code or none.
        special_token: that the tokenizer must know.
    """

    transcribe: str
    transcribe_in: str | None = None
    translate: str | None = None
    languages: tuple[str, ...] = ()
    context_role: str | None = "user"
    prefill: str | None = None
    answer_mark: str | None = None
    chat_template: str | None = None
    special_token: str | None = None


_OWN_FIELDS: Final = ("transcribe", "transcribe_in", "translate", "languages", "context_role")

PHI4_MULTIMODAL: Final = TranscriptionPrompt(
    "Transcribe the audio clip into text.",
    translate="Translate the audio to {to_language}.",
    languages=("en", "zh", "de", "fr", "it", "ja", "es", "pt"),
)
GRANITE_SPEECH: Final = TranscriptionPrompt(
    "can you transcribe the speech into a written format?",
    translate="translate the speech to {to_language}",
    languages=("en", "fr", "de", "es", "pt", "ja"),
)
QWEN2_AUDIO: Final = TranscriptionPrompt(
    "Transcribe the speech into text.", translate="Translate the speech into {to_language} text."
)
QWEN2_5_OMNI: Final = TranscriptionPrompt(
    "Transcribe the audio into text.",
    transcribe_in="Transcribe the {language} audio into text.",
    translate="Listen to the provided speech and produce a translation in {to_language} text.",
)
GEMMA3N: Final = TranscriptionPrompt(
    "Transcribe this audio.",
    transcribe_in="Transcribe this audio in {language}.",
    translate="Translate this audio into {to_language}.",
)
AUDIO_FLAMINGO3: Final = TranscriptionPrompt("Transcribe the input speech.", languages=("en",))
QWEN3_ASR: Final = TranscriptionPrompt(
    "", context_role="system", prefill="language {language}<asr_text>", answer_mark="<asr_text>"
)
VOXTRAL: Final = TranscriptionPrompt(
    "",
    languages=("en", "es", "fr", "pt", "hi", "de", "nl", "it"),
    context_role=None,
    chat_template="<s>[INST][BEGIN_AUDIO][AUDIO][/INST]{% if language %}lang:{{ language }}{% endif %}[TRANSCRIBE]",
    special_token="[TRANSCRIBE]",
)


def read_own_prompt(content: Any) -> TranscriptionPrompt:
    """Read what a checkpoint's `generation_config.json` says under `transcription_prompt`.

    Args:
        content: fields of `TranscriptionPrompt`, those with which a text is asked for.

    Raises:
        ConfigError: a field is unknown, missing or of another form.
    """
    if not isinstance(content, dict) or "transcribe" not in content:
        raise ConfigError(f"{OWN_PROMPT} is {content!r}; it must be an object with 'transcribe'")
    for name, value in content.items():
        if name not in _OWN_FIELDS:
            raise ConfigError(f"{OWN_PROMPT} has the unknown field {name!r}; allowed are {', '.join(_OWN_FIELDS)}")
        if name == "languages":
            is_right = isinstance(value, list) and all(isinstance(code, str) and code in LANGUAGES for code in value)
        elif name == "context_role":
            is_right = value in (None, "user", "system")
        else:
            is_right = isinstance(value, str) or (value is None and name != "transcribe")
        if not is_right:
            raise ConfigError(f"{OWN_PROMPT}: {name}={value!r} is not allowed")
    return TranscriptionPrompt(**{**content, "languages": tuple(content.get("languages", ()))})
