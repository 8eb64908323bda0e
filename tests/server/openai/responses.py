"""Helpers that request responses and validate them strictly against OpenAI's types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.conftest import RunningServer

STRICT_EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


def respond(server: RunningServer, given: Any, **options: Any) -> Response:
    """Request a greedy response of four tokens and validate it strictly against OpenAI's types."""
    options = {"model": "tiny", "temperature": 0, "max_output_tokens": 4, **options}
    with server.client as client:
        raw = client.responses.with_raw_response.create(input=given, **options)
    Response.model_validate_json(raw.text, strict=True)
    return raw.parse()


def stream(server: RunningServer, given: Any, **options: Any) -> list[ResponseStreamEvent]:
    options = {"model": "tiny", "temperature": 0, "max_output_tokens": 4, **options}
    with server.client as client:
        return list(client.responses.create(input=given, stream=True, **options))


def checked(events: Sequence[ResponseStreamEvent]) -> list[str]:
    """Return the types of the events; validate each strictly against OpenAI's types, with the next number."""
    for number, event in enumerate(events):
        assert event.sequence_number == number
        STRICT_EVENT.validate_json(event.to_json(), strict=True)
    return [event.type for event in events]
