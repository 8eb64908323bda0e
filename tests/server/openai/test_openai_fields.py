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
