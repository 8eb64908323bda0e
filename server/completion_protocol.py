"""The body of `POST /v1/completions`: parsed, checked, and turned into prompts and sampling options."""

import json
from functools import cached_property
from typing import Annotated, Any

from pydantic import WithJsonSchema

from mmlora.server.constraint_fields import read_constraint
from mmlora.server.protocol import FieldError, GenerationRequest, shorten

MAX_PROMPTS, MAX_CHOICES = 256, 1024  # the engine queues all of them at once
MAX_FRONT = 500_000  # log probabilities of prompts in one answer
DEFAULT_MAX_TOKENS = 16  # OpenAI's
PROMPT_FORMS = "text, a list of texts, a list of token ids or a list of such lists"
TextOrTokens = str | list[int]

_TOKENS = {"type": "array", "items": {"type": "integer"}}
_TEXTS = {"type": "array", "items": {"type": "string"}}
_PROMPT_SCHEMA = {"anyOf": [{"type": "string"}, _TEXTS, _TOKENS, {"type": "array", "items": _TOKENS}]}


class CompletionRequest(GenerationRequest):
    """The fields of a completion that this server reads."""

    NEUTRAL_VALUES = {"suffix": (None, "")}

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
    multi_modal_data: dict[str, Any] | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None

    @cached_property
    def prompts(self) -> list[TextOrTokens]:
        """The prompts; first asked for by `parse_completion_request`, as to check long ones takes a while.

        Raises:
            FieldError: `prompt` has another form.
        """
        return _as_prompts(self.prompt)

    @property
    def is_prompt_only(self) -> bool:
        """Whether the client wants its prompt back, with log probabilities perhaps, and no answer."""
        return bool(self.echo) and self.max_tokens == 0

    def check_front(self, num_prompt_tokens: int, vocab_size: int) -> None:
        """Refuse to repeat too many log probabilities of prompts, which stand in each of `n` choices.

        Args:
            num_prompt_tokens: of all prompts.
            vocab_size: how many log probabilities -1 stands for.

        Raises:
            FieldError: there would be too many.
        """
        num_top = self._num_prompt_logprobs()
        if num_top is None:
            return
        num_entries = num_prompt_tokens * (self.n or 1) * (1 + (num_top if num_top >= 0 else vocab_size))
        if num_entries > MAX_FRONT:
            raise FieldError(
                f"{num_entries} log probabilities of prompt tokens, in n={self.n or 1} choices each, are too many; "
                f"allowed are {MAX_FRONT}",
                "n",
            )

    def sampling_options(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that the request sets."""
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return {
            **self.given_sampling_options(),
            "structured_outputs": read_constraint(self),
            "max_tokens": 1 if self.is_prompt_only else max_tokens,  # the engine always chooses a token
            "logprobs": self.logprobs,
            "prompt_logprobs": self._num_prompt_logprobs(),
        }

    def _num_prompt_logprobs(self) -> int | None:
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        numbers = [number for number in wanted if number is not None]
        return min(numbers) if -1 in numbers else max(numbers, default=None)  # -1 is the whole vocabulary


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Read a request body.

    Raises:
        FieldError: the body is not JSON, a field has the wrong type or value, or is not supported.
    """
    request = CompletionRequest.parse(body)
    num_prompts, n = len(request.prompts), 1 if request.n is None else request.n
    if num_prompts > MAX_PROMPTS:
        raise FieldError(f"prompt holds {num_prompts} prompts; allowed are {MAX_PROMPTS}", "prompt")
    if num_prompts * n > MAX_CHOICES:
        raise FieldError(f"n={shorten(n)} for {num_prompts} prompts; allowed are {MAX_CHOICES // num_prompts}", "n")
    if num_prompts > 1 and request.multi_modal_data:
        message = f"multi_modal_data belongs to one prompt, but prompt holds {num_prompts}; send them one by one"
        raise FieldError(message, "multi_modal_data")
    if request.best_of not in (None, n):
        message = f"best_of={request.best_of} is not supported; it must be n, which is {n}, or be left out"
        raise FieldError(message, "best_of")
    if request.prompt_logprobs is not None and request.stream:
        message = (
            f"prompt_logprobs={request.prompt_logprobs} needs stream=false; a stream has them with echo and logprobs"
        )
        raise FieldError(message, "prompt_logprobs")
    return request


def _as_prompts(prompt: Any) -> list[TextOrTokens]:
    if isinstance(prompt, str) or (prompt and _is_tokens(prompt)):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise FieldError(f"prompt={shorten(prompt, json.dumps)} must be {PROMPT_FORMS}, not empty", "prompt")
    for index, part in enumerate(prompt):
        is_alike = type(part) is type(prompt[0])
        if not is_alike or not (isinstance(part, str) or _is_tokens(part)):
            shown = shorten(part, json.dumps)
            raise FieldError(f"prompt[{index}] is {shown}; prompt must be {PROMPT_FORMS}", "prompt")
    return list(prompt)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)
