"""Every field that the `openai` client can send is supported, accepted without effect, or refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from mmlora.errors import RequestError
from mmlora.server.openai.chat.protocol import ChatCompletionRequest, parse_chat_request
from mmlora.server.openai.completions.protocol import CompletionRequest, parse_completion_request
from mmlora.server.openai.protocol import HARMLESS_FIELDS, NEUTRAL_EXTRAS, GenerationRequest
from mmlora.server.openai.responses.protocol import ResponsesRequest

PAGE = Path(__file__).parents[3] / "docs" / "http.md"
CHAT_PARAMS = (
    chat_create_params.CompletionCreateParamsBase,
    chat_create_params.CompletionCreateParamsStreaming,
)
PARAMS = (completion_create_params.CompletionCreateParamsBase, completion_create_params.CompletionCreateParamsStreaming)
ENDPOINTS = [
    pytest.param(ChatCompletionRequest, CHAT_PARAMS, id="chat completions"),
    pytest.param(CompletionRequest, PARAMS, id="completions"),
]


def harmless_of(body: type[GenerationRequest]) -> set[str]:
    """Return the fields without effect, except those that the request model has."""
    return HARMLESS_FIELDS - body.model_fields.keys()


def keys_of(params: tuple[Any, ...]) -> set[str]:
    return {key for kind in params for key in (*kind.__required_keys__, *kind.__optional_keys__)}


@pytest.mark.parametrize(("body", "params"), ENDPOINTS)
def test_every_field_of_the_client_is_handled(body: type[GenerationRequest], params: tuple[Any, ...]) -> None:
    keys = keys_of(params)
    assert {"model", "stream", "temperature"} < keys
    assert keys <= {*body.model_fields, *HARMLESS_FIELDS, *body.NEUTRAL_VALUES}


@pytest.mark.parametrize(("body", "params"), ENDPOINTS)
def test_a_field_is_handled_in_one_way(body: type[GenerationRequest], params: tuple[Any, ...]) -> None:
    kinds = [set(body.model_fields), harmless_of(body), {*body.NEUTRAL_VALUES, *NEUTRAL_EXTRAS}]
    assert sum(map(len, kinds)) == len(set.union(*kinds))


@pytest.mark.parametrize("name", sorted({*ChatCompletionRequest.NEUTRAL_VALUES, *NEUTRAL_EXTRAS}))
def test_an_unsupported_field_of_a_chat_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}=.* is not supported; allowed: ") as caught:
        parse_chat_request(b'{"messages": [{"role": "user", "content": "x"}], "%s": {"odd": 1}}' % name.encode())
    assert caught.value.param == name


@pytest.mark.parametrize("name", sorted({*CompletionRequest.NEUTRAL_VALUES, *NEUTRAL_EXTRAS}))
def test_an_unsupported_field_of_a_completion_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}=.* is not supported; allowed: ") as caught:
        parse_completion_request(b'{"prompt": "x", "%s": {"odd": 1}}' % name.encode())
    assert caught.value.param == name


def test_fields_without_effect_are_accepted() -> None:
    neutral = {name: values[-1] for name, values in {**NEUTRAL_EXTRAS, **ChatCompletionRequest.NEUTRAL_VALUES}.items()}
    fields = {
        **neutral,
        **dict.fromkeys(harmless_of(ChatCompletionRequest), "x"),
        "messages": [{"role": "user", "content": "x"}],
    }
    assert parse_chat_request(json_bytes(fields)).messages
    neutral = {name: values[-1] for name, values in {**NEUTRAL_EXTRAS, **CompletionRequest.NEUTRAL_VALUES}.items()}
    assert parse_completion_request(json_bytes({**neutral, "prompt": "x"})).prompts == ["x"]


# The defaults of vLLM's request models, which some clients send in every request.
VLLM_DEFAULTS: dict[str, Any] = {
    "allowed_token_ids": None,
    "bad_words": [],
    "cache_salt": None,
    "detokenize": None,
    "ec_transfer_params": None,
    "frequency_penalty": None,
    "ignore_eos": False,
    "include_reasoning": True,
    "include_stop_str_in_output": False,
    "kv_transfer_params": None,
    "length_penalty": 1.0,
    "logit_bias": None,
    "logprob_token_ids": None,
    "media_io_kwargs": {},
    "min_p": None,
    "min_tokens": 0,
    "mm_processor_kwargs": None,
    "n": 1,
    "priority": 0,
    "prompt_embeds": None,
    "prompt_logprobs": None,
    "repetition_detection": None,
    "response_format": None,
    "return_mm_kwargs": True,
    "return_prompt_text": False,
    "return_token_offsets": False,
    "return_tokens_as_token_ids": None,
    "routed_experts_prompt_start": 0,
    "seed": None,
    "session_id": "a",
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "stop": [],
    "stop_token_ids": [],
    "stream": False,
    "stream_interval": 4,
    "stream_options": None,
    "structured_outputs": None,
    "thinking_token_budget": None,
    "top_k": None,
    "truncate_prompt_tokens": None,
    "truncation_side": None,
    "use_beam_search": False,
    "vllm_xargs": {},
    "watermarking": None,
}
CHAT_DEFAULTS = {
    "add_generation_prompt": True,
    "add_special_tokens": False,
    "chat_template": None,
    "chat_template_kwargs": None,
    "continue_final_message": False,
    "documents": None,
    "echo": False,
    "logprobs": False,
    "max_completion_tokens": None,
    "max_tokens": None,
    "parallel_tool_calls": True,
    "reasoning_effort": None,
    "tool_choice": "none",
    "tools": None,
    "top_logprobs": 0,
}
RESPONSE_DEFAULTS = {
    "background": False,
    "enable_response_messages": False,
    "include": None,
    "previous_input_messages": None,
    "previous_response": None,
    "previous_response_id": None,
    "prompt": None,
    "service_tier": "auto",
    "store": True,
    "text": None,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "truncation": "disabled",
}
CHAT_BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
PARSERS: list[Any] = [
    pytest.param(parse_chat_request, CHAT_BODY, id="chat completions"),
    pytest.param(parse_completion_request, {"prompt": "x"}, id="completions"),
    pytest.param(ResponsesRequest.parse, {"input": "x"}, id="responses"),
]


def test_the_defaults_of_vllm_are_accepted() -> None:
    assert parse_chat_request(json_bytes({**CHAT_BODY, **VLLM_DEFAULTS, **CHAT_DEFAULTS})).messages
    assert parse_completion_request(json_bytes({"prompt": "x", **VLLM_DEFAULTS, "suffix": None})).prompts == ["x"]
    assert ResponsesRequest.parse(json_bytes({"input": "x", **VLLM_DEFAULTS, **RESPONSE_DEFAULTS})).input == "x"


@pytest.mark.parametrize(("parse", "body"), PARSERS)
def test_an_unknown_field_without_a_value_is_ignored(parse: Any, body: dict[str, Any]) -> None:
    empty: list[Any] = [None, False, "", [], {}]
    assert parse(json_bytes({**body, **{f"future_{index}": value for index, value in enumerate(empty)}}))
    assert parse(json_bytes({**body, "stream": True, "stream_options": {"future": False, "include_usage": True}}))
    for value in (0, True, "a", [0], {"a": None}, 1.5):
        with pytest.raises(RequestError, match="unknown field 'future' with value") as caught:
            parse(json_bytes({**body, "future": value}))
        assert caught.value.param == "future"


@pytest.mark.parametrize(("parse", "body"), PARSERS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spaces_between_special_tokens", False),
        ("include_reasoning", False),
        ("length_penalty", 0),
        ("use_beam_search", True),
        ("thinking_token_budget", 0),
        ("logprob_token_ids", [3]),
        ("vllm_xargs", {"a": 1}),
        ("guided_json", {}),
    ],
)
def test_a_value_of_vllm_that_changes_the_output_is_refused(
    parse: Any, body: dict[str, Any], field: str, value: Any
) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        parse(json_bytes({**body, field: value}))
    assert caught.value.param == field


def json_bytes(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(("body", "column"), [(ChatCompletionRequest, 1), (CompletionRequest, 2)])
def test_the_documentation_has_every_field(body: type[GenerationRequest], column: int) -> None:
    """In `docs/http.md`, `yes` is supported, `accepted` has no effect, and other entries name the allowed values."""
    section = PAGE.read_text().partition("## Fields of chat completions and completions")[2].partition("\n## ")[0]
    listed: dict[str, str] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| `") else []
        listed |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells[column]) if cells else {}
    expected = {
        **dict.fromkeys(body.model_fields, "yes"),
        **dict.fromkeys(harmless_of(body), "accepted"),
        **dict.fromkeys({**NEUTRAL_EXTRAS, **body.NEUTRAL_VALUES}, "only"),
    }
    fates = {name: cell.split()[0].rstrip(":,") for name, cell in listed.items() if cell != "unknown"}
    assert fates == expected
