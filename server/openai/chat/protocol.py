"""The request body of `POST /v1/chat/completions`.

`mmlora.inputs.chat` validates the messages.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Final

from pydantic import Field, JsonValue, WithJsonSchema

from mmlora.errors import RequestError
from mmlora.server.bodies import FirstOnly
from mmlora.server.openai.protocol import GenerationRequest, check_other_fields, completion_limit, read_constraint
from mmlora.server.openai.schemas import MESSAGES
from mmlora.server.openai.tools.choice import ToolChoice, read_tool_choice
from mmlora.utils.text import shorten

EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Other fields of `reasoning`, with their values that have no effect: there are no summaries.
REASONING_VALUES: Final[Mapping[str, tuple[JsonValue, ...]]] = {
    "reasoning.context": (None, "auto"),
    "reasoning.generate_summary": (None, "auto"),
    "reasoning.mode": (None, "standard"),
    "reasoning.summary": (None, "auto"),
}


class ToolRequest(GenerationRequest):
    """Fields of the endpoints with tools; `HAS_FLAT_TOOLS` is `is_flat` of `read_tool_choice`."""

    HAS_FLAT_TOOLS: ClassVar[bool] = False

    tools: FirstOnly[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | str | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @cached_property
    def effort(self) -> str | None:
        """The reasoning effort, for which there are two fields; None if neither is given.

        Raises:
            RequestError: a field is malformed or not supported, or they differ.
        """
        others = {f"reasoning.{name}": value for name, value in (self.reasoning or {}).items() if name != "effort"}
        check_other_fields(others, REASONING_VALUES)
        efforts = {"reasoning": (self.reasoning or {}).get("effort"), "reasoning_effort": self.reasoning_effort}
        given = {name: effort for name, effort in efforts.items() if effort is not None}
        for name, effort in given.items():
            if effort not in EFFORTS:
                shown = "reasoning.effort" if name == "reasoning" else name
                raise RequestError(f"{shown}={shorten(effort, json.dumps)} must be one of {', '.join(EFFORTS)}", name)
        if len(set(given.values())) > 1:
            text = f"reasoning.effort={given['reasoning']} and reasoning_effort={given['reasoning_effort']} differ"
            raise RequestError(f"{text}; send only one of them", "reasoning_effort")
        return next(iter(given.values()), None)

    @cached_property
    def tooling(self) -> ToolChoice | None:
        """The tools and how they may be called; None if the request has neither tools nor a choice.

        Raises:
            RequestError: a field is malformed.
        """
        if self.tools is None and self.tool_choice is None:
            return None
        return read_tool_choice(self.tools, self.tool_choice, self.parallel_tool_calls, is_flat=self.HAS_FLAT_TOOLS)


class ChatCompletionRequest(ToolRequest):
    """The supported fields of a chat completion request."""

    NEUTRAL_VALUES = {
        "audio": (None,),
        "chat_template": (None, ""),
        "documents": (None, []),
        "function_call": (None, "none"),
        "functions": (None, []),
        "modalities": (None, ["text"]),
        "moderation": (None,),
        "prediction": (None,),
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
    }

    messages: Annotated[FirstOnly[dict[str, Any]], Field(min_length=1), WithJsonSchema(MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Number of alternatives to report at each token; None for no log probabilities."""
        return self.top_logprobs or 0 if self.logprobs else None

    def sampling_options(self) -> dict[str, Any]:
        """Return the fields of `SamplingParams` that the request sets.

        Raises:
            RequestError: two fields contradict each other.
        """
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs={self.top_logprobs} needs logprobs=true", "top_logprobs")
        return {
            **self.given_sampling_options(),
            "max_tokens": completion_limit(self.max_tokens, self.max_completion_tokens),
            "logprobs": self.num_logprobs,
            "prompt_logprobs": self.prompt_logprobs,
            "structured_outputs": read_constraint(self),
        }


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """Parse a request body.

    Raises:
        RequestError: the body is not JSON, or a field has the wrong type or is not supported.
    """
    request = ChatCompletionRequest.parse(body)
    _ = request.tooling
    if request.prompt_logprobs is not None and request.stream:
        raise RequestError(f"prompt_logprobs={request.prompt_logprobs} needs stream=false", "prompt_logprobs")
    return request
