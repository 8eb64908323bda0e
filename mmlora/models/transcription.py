"""`TranscriptionPrompt`: how a model is asked for the words of a clip, in the language spoken or in another.

The words are those of model cards and cookbooks, for Qwen3-ASR, Audio Flamingo 3 and Voxtral those of the processors of
`transformers`; Qwen2-Audio and Gemma 3n follow instructions in any words.
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
        takes_context: a request may tell what else the model should know.
        chat_template: in place of the model's and of `transcribe`; it is given the `context`, and the `code` and `name`
            of the `language`, which is None where it is not told.
        special_token: of the template, that the tokenizer must know.
        answer_mark: what stands in an answer between the language heard and the text, unless the language was told.
    """

    transcribe: str
    transcribe_in: str | None = None
    translate: str | None = None
    languages: tuple[str, ...] = ()
    takes_context: bool = True
    chat_template: str | None = None
    special_token: str | None = None
    answer_mark: str | None = None


_OWN_FIELDS: Final = ("transcribe", "transcribe_in", "translate", "languages", "takes_context")

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
    "",
    chat_template=(
        "<|im_start|>system\n{{ context }}<|im_end|>\n"
        "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
        "<|im_start|>assistant\n{% if language %}language {{ language.name }}<asr_text>{% endif %}"
    ),
    languages=tuple("ar cs da de el en es fa fi fr hi hu id it ja ko mk ms nl pl pt ro ru sv th tr vi yue zh".split()),
    special_token="<asr_text>",
    answer_mark="<asr_text>",
)
VOXTRAL: Final = TranscriptionPrompt(
    "",
    languages=("en", "es", "fr", "pt", "hi", "de", "nl", "it"),
    takes_context=False,
    chat_template=(
        "<s>[INST][BEGIN_AUDIO][AUDIO][/INST]{% if language %}lang:{{ language.code }}{% endif %}[TRANSCRIBE]"
    ),
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
            allowed = "a list of ISO 639-1 codes"
        elif name == "takes_context":
            is_right, allowed = isinstance(value, bool), "true or false"
        else:
            is_right, allowed = isinstance(value, str) or (value is None and name != "transcribe"), "text"
        if not is_right:
            raise ConfigError(f"{OWN_PROMPT}: {name}={value!r} must be {allowed}")
    return TranscriptionPrompt(**{**content, "languages": tuple(content.get("languages", ()))})
