"""The request body of `POST /v1/completions`."""

import json
from functools import cached_property
from typing import Annotated, Any

from pydantic import WithJsonSchema

from mmlora.errors import RequestError
from mmlora.server.bodies import json_schema
from mmlora.server.openai.protocol import GenerationRequest, read_constraint
from mmlora.utils.text import shorten

MAX_PROMPTS, MAX_CHOICES = 256, 1024  # of one request; they are queued in the engine at the same time
DEFAULT_MAX_TOKENS = 16  # of OpenAI's API
PROMPT_FORMS = "text, a list of texts, a list of token ids or a list of such lists"
TextOrTokens = str | list[int]


class CompletionRequest(GenerationRequest):
    """The supported fields of a legacy completion request."""

    NEUTRAL_VALUES = {"reasoning_effort": (None, "none"), "suffix": (None, ""), "verbosity": (None, "medium")}

    prompt: Annotated[Any, WithJsonSchema(json_schema(str | list[str] | list[int] | list[list[int]]))]
    multi_modal_data: dict[str, Any] | None = None
    multi_modal_uuids: dict[str, Any] | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    @cached_property
    def prompts(self) -> list[TextOrTokens]:
        """The validated prompts. `parse_completion_request` caches them outside the event loop, as long ones take time.

        Raises:
            RequestError: `prompt` is malformed.
        """
        return _as_prompts(self.prompt)

    @property
    def is_prompt_only(self) -> bool:
        """Whether only the prompt is returned (`echo` with `max_tokens=0`), possibly with log probabilities."""
        return bool(self.echo) and self.max_tokens == 0

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives to report at each token of a prompt; None for no log probabilities."""
        requested = [self.prompt_logprobs, self.logprobs if self.echo else None]
        numbers = [number for number in requested if number is not None]
        return min(numbers) if -1 in numbers else max(numbers, default=None)  # -1 is the whole vocabulary

    def sampling_options(self) -> dict[str, Any]:
        """Return the fields of `SamplingParams` that the request sets."""
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return {
            **self.given_sampling_options(),
            "structured_outputs": read_constraint(self),
            "max_tokens": 1 if self.is_prompt_only else max_tokens,  # the engine always samples a token
            "logprobs": self.logprobs,
            "prompt_logprobs": self.num_prompt_logprobs,
        }


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Parse and check a request body.

    Raises:
        RequestError: the body is not JSON, a field has the wrong type or value, or is not supported.
    """
    request = CompletionRequest.parse(body)
    num_prompts, n = len(request.prompts), 1 if request.n is None else request.n
    if num_prompts > MAX_PROMPTS:
        raise RequestError(f"prompt has {num_prompts} prompts; the limit is {MAX_PROMPTS}", "prompt")
    if num_prompts * n > MAX_CHOICES:
        raise RequestError(f"n={shorten(n)} for {num_prompts} prompts; the limit is {MAX_CHOICES // num_prompts}", "n")
    for name in ("multi_modal_data", "multi_modal_uuids"):
        if num_prompts > 1 and getattr(request, name):
            message = f"{name} needs a single prompt, but prompt has {num_prompts}; send one request per prompt"
            raise RequestError(message, name)
    if request.best_of not in (None, n):
        message = f"best_of={request.best_of} is not supported; it must equal n, which is {n}, or be left out"
        raise RequestError(message, "best_of")
    if request.prompt_logprobs is not None and request.stream:
        message = f"prompt_logprobs={request.prompt_logprobs} needs stream=false; in streams use echo and logprobs"
        raise RequestError(message, "prompt_logprobs")
    return request


def _as_prompts(prompt: Any) -> list[TextOrTokens]:
    if isinstance(prompt, str) or (prompt and _is_tokens(prompt)):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(f"prompt={shorten(prompt, json.dumps)} must be {PROMPT_FORMS}, not empty", "prompt")
    for index, part in enumerate(prompt):
        is_alike = type(part) is type(prompt[0])
        if not is_alike or not (isinstance(part, str) or _is_tokens(part)):
            shown = shorten(part, json.dumps)
            raise RequestError(f"prompt[{index}] is {shown}; prompt must be {PROMPT_FORMS}", "prompt")
    return list(prompt)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)
