"""`TranscriptionPrompt`: the prompts with which each family transcribes or translates speech.

The prompts come from model cards and cookbooks; those of Qwen3-ASR, Audio Flamingo 3 and Voxtral from the processors of
`transformers`. Qwen2-Audio and Gemma 3n follow free instructions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers.models.whisper.tokenization_whisper import LANGUAGES as WHISPER_LANGUAGES

from mmlora.errors import ConfigError

LANGUAGES: Final[Mapping[str, str]] = WHISPER_LANGUAGES  # lowercase English names by ISO 639-1 code
PROMPT_FIELD: Final = "transcription_prompt"  # in a checkpoint's generation_config.json


@dataclass(frozen=True)
class TranscriptionPrompt:
    """The prompts of a model for transcription and translation.

    Attributes:
        transcribe: text after the clip that asks for a transcription.
        transcribe_in: the same for a given `{language}` of the speech; None if the model was not trained for it.
        translate: text after the clip that asks for a translation to `{to_language}`; None if the model was not trained
            to translate.
        languages: codes of the supported languages; empty for all of `LANGUAGES`.
        takes_context: a request may add a prompt, such as names that occur in the clip.
        chat_template: replaces the model's own template and `transcribe`. Its variables are `context` and `language`,
            which has a `code` and a `name`, or is None if the request gives no language.
        special_token: of the template; the tokenizer must have it.
        language_separator: between the detected language and the text in the model's output; the output has neither if
            the request gives the language.
    """

    transcribe: str
    transcribe_in: str | None = None
    translate: str | None = None
    languages: tuple[str, ...] = ()
    takes_context: bool = True
    chat_template: str | None = None
    special_token: str | None = None
    language_separator: str | None = None


PROMPT_FIELDS: Final = ("transcribe", "transcribe_in", "translate", "languages", "takes_context")

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
    language_separator="<asr_text>",
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


def read_checkpoint_prompt(content: Any) -> TranscriptionPrompt:
    """Read the `transcription_prompt` of a checkpoint's `generation_config.json`.

    Args:
        content: the fields of `TranscriptionPrompt` in `PROMPT_FIELDS`, by name.

    Raises:
        ConfigError: a field is unknown, missing or of the wrong type.
    """
    if not isinstance(content, dict) or "transcribe" not in content:
        raise ConfigError(f"{PROMPT_FIELD} is {content!r}; it must be an object with 'transcribe'")
    for name, value in content.items():
        if name not in PROMPT_FIELDS:
            raise ConfigError(f"{PROMPT_FIELD} has the unknown field {name!r}; allowed are {', '.join(PROMPT_FIELDS)}")
        if name == "languages":
            is_valid = isinstance(value, list) and all(isinstance(code, str) and code in LANGUAGES for code in value)
            allowed = "a list of ISO 639-1 codes"
        elif name == "takes_context":
            is_valid, allowed = isinstance(value, bool), "true or false"
        else:
            is_valid, allowed = isinstance(value, str) or (value is None and name != "transcribe"), "a string"
        if not is_valid:
            raise ConfigError(f"{PROMPT_FIELD}: {name}={value!r} must be {allowed}")
    return TranscriptionPrompt(**{**content, "languages": tuple(content.get("languages", ()))})
