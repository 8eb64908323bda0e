"""The form fields of `POST /v1/audio/transcriptions` and `/v1/audio/translations`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema

from mmlora.errors import RequestError
from mmlora.models.transcription import LANGUAGES
from mmlora.sampling_params import SamplingParams
from mmlora.server.bodies import FirstOnly, read_json, validate_fields
from mmlora.server.openai.protocol import CommonFields, check_other_fields, completion_limit, sampling_model
from mmlora.server.openai.transcriptions.form import parse_form
from mmlora.utils.text import shorten

LISTS = ("include", "timestamp_granularities")
EMPTY_TEXTS = ("null", "none", "false", "[]", "{}")  # as forms write values that have no effect in unknown fields
# The output is one text without stop strings and special tokens.
FormSamplingFields = sampling_model(
    SamplingParams,
    without=(
        *("n", "logit_bias", "stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens"),
        *("allowed_token_ids", "bad_words", "truncate_prompt_tokens", "detokenize"),
    ),
)


def _read_lora(value: Any) -> Any:
    """Parse `lora` from a form field: a list is sent as JSON."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    return read_json(value, "lora")


class AudioRequest(FormSamplingFields, CommonFields):  # type: ignore[valid-type, misc]  # created at import
    """Form fields of both endpoints; other fields are in `model_extra` and go through `check_other_fields`.

    `TASK` is the task in responses. `NEUTRAL_VALUES` has the values without effect, as strings, of unsupported fields.
    """

    model_config = ConfigDict(extra="allow")
    TASK: ClassVar[str]
    NEUTRAL_VALUES: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {"n": ("1",)}

    file: bytes
    lora: Annotated[
        str | FirstOnly[dict[str, Any]] | None, BeforeValidator(_read_lora), WithJsonSchema({"type": "string"})
    ] = None
    language: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text", "verbose_json"] = "json"
    stream: bool = False
    stream_include_usage: bool | None = None  # the last event of a stream always has the token counts
    stream_continuous_usage_stats: bool | None = None
    temperature: float = 0.0
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    priority: int = 0

    @property
    def continuous_usage(self) -> bool:
        """Whether each event of the stream has the token counts so far."""
        return bool(self.stream_continuous_usage_stats) and self.stream_include_usage is not False

    @property
    def has_logprobs(self) -> bool:
        """Whether the log probability of each token is requested."""
        return False

    @classmethod
    def parse(cls, content_type: str | None, body: bytes) -> Self:
        """Parse a form.

        Raises:
            RequestError: the form is malformed, or a field is repeated, not supported, or has the wrong type or value.
        """
        fields = {name: _read_field(name, contents) for name, contents in parse_form(content_type, body).items()}
        request = validate_fields(cls, {name: value for name, value in fields.items() if value is not None})
        others = {name: value for name, value in (request.model_extra or {}).items() if not _is_empty(value)}
        check_other_fields(others, cls.NEUTRAL_VALUES)
        request.check()
        return request

    def check(self) -> None:
        """Refuse invalid values and combinations.

        Raises:
            RequestError: naming one field.
        """
        if self.stream and self.response_format == "verbose_json":
            message = "response_format=verbose_json needs stream=false; a stream allows json and text"
            raise RequestError(message, "response_format")
        if self.language is not None:
            self.language = checked_language(self.language, "language")

    def sampling_options(self) -> dict[str, Any]:
        """Return the fields of `SamplingParams` that the request sets.

        Raises:
            RequestError: two fields contradict each other.
        """
        given = {name: getattr(self, name) for name in FormSamplingFields.model_fields}
        return {
            **{name: value for name, value in given.items() if value is not None},
            "max_tokens": completion_limit(self.max_tokens, self.max_completion_tokens),
            "logprobs": 0 if self.has_logprobs else None,
        }


class TranscriptionRequest(AudioRequest):
    """Form fields of a transcription."""

    TASK = "transcribe"
    NEUTRAL_VALUES = {**AudioRequest.NEUTRAL_VALUES, "timestamp_granularities": ([],)}

    include: FirstOnly[Literal["logprobs"]] = []
    chunking_strategy: Literal["auto"] | None = None  # a clip is one chunk; a longer one is refused

    @property
    def has_logprobs(self) -> bool:
        """Whether the log probability of each token is requested."""
        return "logprobs" in self.include

    def check(self) -> None:
        """See `AudioRequest.check`."""
        super().check()
        if self.has_logprobs and self.response_format != "json":
            message = f"include=logprobs needs response_format=json; received {self.response_format}"
            raise RequestError(message, "include")


class TranslationRequest(AudioRequest):
    """Form fields of a translation."""

    TASK = "translate"

    to_language: str = "en"

    def check(self) -> None:
        """See `AudioRequest.check`."""
        super().check()
        self.to_language = checked_language(self.to_language, "to_language")


def checked_language(code: str, field: str) -> str:
    """Return a language code in lowercase.

    Raises:
        RequestError: the code is unknown.
    """
    if code.lower() not in LANGUAGES:
        message = f"{field}={shorten(code)} must be an ISO 639-1 code, one of {', '.join(sorted(LANGUAGES))}"
        raise RequestError(message, field)
    return code.lower()


def _is_empty(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in EMPTY_TEXTS


def _read_field(name: str, contents: list[bytes]) -> bytes | str | list[str] | None:
    """Return a field's value; None for an empty field, which counts as not given."""
    if name not in LISTS and len(contents) > 1:
        raise RequestError(f"{shorten(name)} is given {len(contents)} times; it must be given once", name[:80])
    if name == "file":
        return contents[0]
    try:
        texts = [text for content in contents if (text := content.decode())]
    except UnicodeDecodeError as error:
        raise RequestError(f"{shorten(name)} is not UTF-8: {error.reason} at byte {error.start}", name[:80]) from None
    return texts if name in LISTS else next(iter(texts), None)
