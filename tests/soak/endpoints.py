"""Convert a question to a request of each endpoint, and read the responses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.soak.questions import Question

Json = dict[str, Any]
INPUT_TYPES = {"text": "input_text", "image_url": "input_image", "input_audio": "input_audio"}


@dataclass(frozen=True)
class EndpointRequest:
    """A question in the form of one endpoint."""

    route: str
    arguments: Json  # of httpx: `json`, or `data` and `files`


def endpoint_requests(question: Question, fields: Json, *, is_stream: bool) -> list[EndpointRequest]:
    """Return a question as requests of all endpoints that support it; all must return the same text.

    Args:
        question: the question.
        fields: fields that select the adapter.
        is_stream: request a stream.
    """
    body = {**question.body, **fields, "stream": is_stream}
    if "prompt" in body:
        return [EndpointRequest("/v1/completions", {"json": body})]
    response = {name: value for name, value in body.items() if name not in ("messages", "max_tokens")}
    response |= {"max_output_tokens": body["max_tokens"], "input": list(map(_as_item, body["messages"]))}
    found = [
        EndpointRequest("/v1/chat/completions", {"json": body}),
        EndpointRequest("/v1/responses", {"json": response}),
    ]
    if question.clip is not None:
        form = {name: value for name, value in body.items() if name != "messages"}
        data = {name: value if isinstance(value, str) else json.dumps(value) for name, value in form.items()}
        found.append(
            EndpointRequest("/v1/audio/transcriptions", {"data": data, "files": {"file": ("a.wav", question.clip)}})
        )
    return found


def read_response(route: str, content: str, *, is_stream: bool) -> tuple[str, Json]:
    """Return the text of a response and its `lora` object."""
    if not is_stream:
        return _read_whole(json.loads(content))
    events = [line.removeprefix("data: ") for line in content.splitlines() if line.startswith("data: ")]
    parsed = [json.loads(event) for event in events if event != "[DONE]"]
    if not parsed or any("error" in event for event in parsed):
        return f"<{content[-300:]!r}>", {}
    if route == "/v1/responses":
        text = "".join(event["delta"] for event in parsed if event["type"] == "response.output_text.delta")
        is_whole = parsed[-1]["type"] in ("response.completed", "response.incomplete")
        return text if is_whole else "<no end>", parsed[0]["response"]["lora"]
    if route == "/v1/audio/transcriptions":
        text = "".join(event["delta"] for event in parsed if event["type"] == "transcript.text.delta")
        return text if parsed[-1]["type"] == "transcript.text.done" else "<no end>", parsed[0]["lora"]
    choices = [choice for chunk in parsed for choice in chunk["choices"]]
    text = "".join(c["delta"].get("content") or "" if "delta" in c else c["text"] for c in choices)
    return text if events[-1] == "[DONE]" else "<no end>", parsed[0]["lora"]


def _read_whole(body: Json) -> tuple[str, Json]:
    if "output" in body:
        parts = [part["text"] for item in body["output"] for part in item["content"]]
        return "".join(parts), body["lora"]
    if "choices" not in body:
        return body["text"], body["lora"]
    choice = body["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"], body["lora"]


def _as_item(message: Json) -> Json:
    """Convert a chat message to an input item of the Responses API."""
    parts = []
    for part in message["content"]:
        kind = INPUT_TYPES[part["type"]]
        value = part[part["type"]]["url"] if kind == "input_image" else part[part["type"]]
        parts.append({"type": kind, part["type"]: value})
    return {"role": message["role"], "content": parts}
