"""The forms in which callers pass prompts, and their tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmlora.errors import RequestError
from mmlora.processors.media.decoding import why_not_taken
from mmlora.utils.text import shorten

PROMPT_KEYS = ("prompt", "prompt_token_ids", "multi_modal_data", "mm_processor_kwargs", "cache_salt")
MAX_SALT_CHARS = 1024  # hashed by the engine thread, and kept with what is cached
MAX_CHARS_PER_TOKEN = 256  # more than the longest token of any vocabulary in use
Prompt = str | Sequence[int] | Mapping[str, Any]


def prompt_fields(prompt: Prompt) -> Mapping[str, Any]:
    """Return a prompt as a mapping with text, or token ids (which count), or both.

    Raises:
        RequestError: it has another form.
    """
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, Mapping):
        unknown = sorted(str(key) for key in prompt if key not in PROMPT_KEYS)
        if unknown:
            reason = why_not_taken(unknown[0]) or f"allowed: {', '.join(PROMPT_KEYS)}"
            raise RequestError(f"prompt has unknown key(s) {', '.join(unknown)}; {reason}")
        if prompt.get("prompt") is None and prompt.get("prompt_token_ids") is None:
            raise RequestError("a prompt needs 'prompt' or 'prompt_token_ids'")
        _check_types(prompt)
        return prompt
    if isinstance(prompt, Sequence):
        fields = {"prompt_token_ids": prompt}
        _check_types(fields)
        return fields
    raise RequestError(f"prompt is a {type(prompt).__name__}; it must be text, token ids or a mapping")


def as_items(contents: object) -> list[object]:
    """Return one item or a list of them as a list; an `(array, rate)` tuple is one item."""
    if contents is None:
        return []
    return list(contents) if isinstance(contents, list) else [contents]


def encode_text(tokenizer: Any, text: str, max_model_len: int | None, *, add_special_tokens: bool = True) -> list[int]:
    """Tokenize a prompt, unless it is so long that its tokens cannot fit.

    Raises:
        RequestError: it is too long, or no text (a lone surrogate, for one).
    """
    if max_model_len is not None and len(text) > max_model_len * MAX_CHARS_PER_TOKEN:
        raise RequestError(
            f"the prompt has {len(text)} characters, which cannot fit into max_model_len={max_model_len} tokens"
        )
    try:
        return list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
    except (TypeError, ValueError) as error:
        raise RequestError(f"the prompt cannot be tokenized: {error}") from None


def _check_types(fields: Mapping[str, Any]) -> None:
    text, ids = fields.get("prompt"), fields.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"'prompt' is a {type(text).__name__}; it must be text")
    is_ids = isinstance(ids, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if ids is not None and not is_ids:
        raise RequestError("'prompt_token_ids' must be a list of integers")
    options = fields.get("mm_processor_kwargs")
    if options is not None and not isinstance(options, Mapping):
        raise RequestError(f"mm_processor_kwargs is a {type(options).__name__}; it must be a mapping")
    salt = fields.get("cache_salt")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise RequestError(f"cache_salt={shorten(salt)} must be text, and not empty")
    if salt is not None and len(salt) > MAX_SALT_CHARS:
        raise RequestError(f"cache_salt has {len(salt)} characters; allowed are {MAX_SALT_CHARS}")
