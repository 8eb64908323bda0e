"""The forms of a prompt: text, token ids, or a mapping such as `TextPrompt` and `TokensPrompt`."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NotRequired, TypedDict

from mmlora.errors import RequestError
from mmlora.processors.media.loader import why_unsupported
from mmlora.utils.text import describe_type, shorten

PROMPT_KEYS: Final = ("prompt", "prompt_token_ids", "multi_modal_data", "mm_processor_kwargs", "cache_salt")
MAX_SALT_CHARS: Final = 1024  # the engine thread hashes it, and caches keep it


class TextPrompt(TypedDict):
    """A prompt as text; its fields are those of a mapping that is passed to `LLM.generate`."""

    prompt: str
    multi_modal_data: NotRequired[Mapping[str, Any] | None]
    mm_processor_kwargs: NotRequired[Mapping[str, Any] | None]
    cache_salt: NotRequired[str | None]


class TokensPrompt(TypedDict):
    """A prompt as token ids, optionally with its text, which outputs repeat."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str | None]
    multi_modal_data: NotRequired[Mapping[str, Any] | None]
    mm_processor_kwargs: NotRequired[Mapping[str, Any] | None]
    cache_salt: NotRequired[str | None]


def prompt_fields(prompt: str | Sequence[int] | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a prompt as a mapping with `prompt`, `prompt_token_ids` or both.

    Raises:
        RequestError: it has another type or unknown keys.
    """
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, Mapping):
        unknown = sorted(str(key) for key in prompt if key not in PROMPT_KEYS)
        if unknown:
            reason = why_unsupported(unknown[0]) or f"allowed: {', '.join(PROMPT_KEYS)}"
            raise RequestError(f"prompt has unknown key(s) {', '.join(unknown)}; {reason}")
        if prompt.get("prompt") is None and prompt.get("prompt_token_ids") is None:
            raise RequestError("a prompt needs 'prompt' or 'prompt_token_ids'")
        _check_types(prompt)
        return prompt
    if not isinstance(prompt, Sequence):
        raise RequestError(f"prompt is {describe_type(prompt)}; it must be text, token ids or a mapping")
    fields = {"prompt_token_ids": prompt}
    _check_types(fields)
    return fields


def _check_types(fields: Mapping[str, Any]) -> None:
    text, ids = fields.get("prompt"), fields.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"'prompt' is {describe_type(text)}; it must be text")
    is_ids = isinstance(ids, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if ids is not None and not is_ids:
        raise RequestError("'prompt_token_ids' must be a list of integers")
    check_options(fields.get("mm_processor_kwargs"), fields.get("cache_salt"))


def check_options(options: object, salt: object) -> None:
    """Check `mm_processor_kwargs` and `cache_salt` of a prompt.

    Raises:
        RequestError: one has the wrong type, or the salt is empty or too long.
    """
    if options is not None and not isinstance(options, Mapping):
        message = f"mm_processor_kwargs is {describe_type(options)}; it must be a mapping"
        raise RequestError(message, "mm_processor_kwargs")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise RequestError(f"cache_salt={shorten(salt)} must be non-empty text", "cache_salt")
    if isinstance(salt, str) and len(salt) > MAX_SALT_CHARS:
        raise RequestError(f"cache_salt has {len(salt)} characters; the limit is {MAX_SALT_CHARS}", "cache_salt")
