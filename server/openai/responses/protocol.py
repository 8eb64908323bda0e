"""The request body of `POST /v1/responses`; `input.py` reads its `input`."""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, WithJsonSchema

from mmlora.errors import RequestError
from mmlora.server.bodies import FirstOnly
from mmlora.server.openai.chat.protocol import ToolRequest
from mmlora.server.openai.protocol import check_other_fields, read_constraint
from mmlora.server.openai.schemas import INPUT
from mmlora.server.openai.tools.choice import ToolChoice
from mmlora.utils.text import shorten

MAX_METADATA = 16
MAX_TOOLS_LENGTH = 2**20  # they are repeated in the response, in several events of a stream
# Only the last has an effect. The others concern tools of OpenAI and reasoning, which this server does not have.
Includable = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
    "message.output_text.logprobs",
]
TEXT_VALUES: Mapping[str, tuple[JsonValue, ...]] = {"text.verbosity": (None, "medium")}
Label = Annotated[str, Field(max_length=512)]  # repeated in the response, in several events of a stream


def _check_metadata(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_METADATA:
        raise ValueError(f"it has {len(value)} keys; the limit is {MAX_METADATA}")
    return value


Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Label], BeforeValidator(_check_metadata)]


class ResponsesRequest(ToolRequest):
    """The supported fields of a Responses API request."""

    NEUTRAL_VALUES = {
        "background": (None, False),
        "context_management": (None, []),
        "conversation": (None, ""),
        "max_tool_calls": (None,),
        "moderation": (None,),
        "previous_response_id": (None, ""),
        "prompt": (None,),
        "truncation": (None, "disabled"),
    }

    HAS_FLAT_TOOLS = True

    input: Annotated[Any, WithJsonSchema(INPUT)]
    instructions: str | None = None
    n: Literal[1] | None = None
    prompt_logprobs: None = None
    return_token_ids: Literal[False] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    include: FirstOnly[Includable] | None = None
    top_logprobs: Annotated[int, Field(ge=-1)] | None = None
    text: dict[str, Any] | None = None
    metadata: Metadata | None = None
    prompt_cache_key: Label | None = None
    safety_identifier: Label | None = None
    user: Label | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Number of alternatives to report at each token; None for no log probabilities."""
        return self.top_logprobs or 0 if "message.output_text.logprobs" in (self.include or ()) else None

    @cached_property
    def tooling(self) -> ToolChoice | None:
        """See `ToolRequest.tooling`."""
        # With tool_choice="none" tools are not part of the prompt, so max_model_len does not bound their length.
        if (length := _length(self.tools, "tools")) > MAX_TOOLS_LENGTH:
            raise RequestError(f"tools has {length} characters; the limit is {MAX_TOOLS_LENGTH}", "tools")
        return super().tooling

    def sampling_options(self) -> dict[str, Any]:
        """Return the fields of `SamplingParams` that the request sets.

        Raises:
            RequestError: a field requires another one or is not supported.
        """
        if self.max_tokens is not None:
            message = f"max_tokens={self.max_tokens} is not supported here; use max_output_tokens"
            raise RequestError(message, "max_tokens")
        if self.top_logprobs and self.num_logprobs is None:
            message = f'top_logprobs={self.top_logprobs} needs include=["message.output_text.logprobs"]'
            raise RequestError(message, "top_logprobs")
        limits = {"max_tokens": self.max_output_tokens, "logprobs": self.num_logprobs}
        return {**self.given_sampling_options(), **limits, **self._constraint()}

    def _constraint(self) -> dict[str, Any]:
        """Return the sampling options of `text` and `structured_outputs`."""
        if self.response_format is not None:
            raise RequestError("response_format is not supported here; use text.format", "response_format")
        _length(self.text, "text")
        text = dict(self.text or {})
        text_format = text.pop("format", None)
        check_other_fields({f"text.{name}": value for name, value in text.items()}, TEXT_VALUES)
        if not isinstance(text_format, dict | None):
            raise RequestError(f"text.format={shorten(text_format, json.dumps)} must be an object", "text.format")
        return {"structured_outputs": read_constraint(self, text_format)}


def _length(value: Any, name: str) -> int:
    """Return the length in characters of a field that the response repeats.

    Raises:
        RequestError: it has a number that JSON cannot encode, such as 1e999, which is read as infinity.
    """
    try:
        return len(json.dumps(value, allow_nan=False))
    except ValueError:
        raise RequestError(f"{name} contains NaN or an infinite number; numbers must be finite", name) from None
