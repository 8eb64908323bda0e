"""Responses with the `openai` client: equality with chats, adapters, streams, and errors."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest
from openai.types.responses import (
    Response,
    ResponseCreatedEvent,
    ResponseFailedEvent,
    ResponseIncompleteEvent,
    ResponseTextDeltaEvent,
)

from mmlora.errors import MMLoRAError
from mmlora.outputs import RequestOutput
from mmlora.server.args import LoRAModule
from mmlora.server.openai.protocol import SAMPLING_FIELDS, GenerationRequest
from tests.server.conftest import (
    RunningServer,
    ServerFactory,
    input_audio_part,
    leave_before_answer,
    text_part,
    url_part,
    wait_until_idle,
)
from tests.server.openai.responses import checked, respond, stream

LOGPROBS = "message.output_text.logprobs"


@pytest.fixture(scope="module")
def server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    defaults = {"audio": adapters["speech"], "image": adapters["vision"]}
    return start_server(
        LoRAModule("words", adapters["words"]), default_mm_loras=defaults, limit_mm_per_prompt={"image": 1}
    )


def lora_of(response: Response) -> dict[str, Any]:
    return dict(response.to_dict()["lora"])  # type: ignore[call-overload]


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def image_part(png: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return {"type": "input_image", "image_url": url, "detail": "auto"}


QUESTION = {"type": "input_text", "text": "what is it?"}


def test_a_response_equals_the_chat_completion_of_the_same_conversation(
    server: RunningServer, wav: bytes, png: bytes
) -> None:
    """Compare tokens, log probabilities and token counts; equal counts show that the prompts are equal."""
    cases = [
        ("what is it?", [text_part("what is it?")]),
        (user(QUESTION), [text_part("what is it?")]),
        (user(QUESTION, QUESTION), [text_part("what is it?"), text_part("what is it?")]),
        (user(input_audio_part(wav), QUESTION), [input_audio_part(wav), text_part("what is it?")]),
        (user(image_part(png), QUESTION), [url_part("image_url", png, "image/png"), text_part("what is it?")]),
    ]
    for given, parts in cases:
        chat = server.ask(*parts, max_tokens=8, logprobs=True, top_logprobs=2)
        response = respond(server, given, max_output_tokens=8, include=[LOGPROBS], top_logprobs=2).to_dict()
        message, choice = response["output"][0], chat["choices"][0]  # type: ignore[index]
        assert message["content"][0]["text"] == choice["message"]["content"]
        tokens, expected = message["content"][0]["logprobs"], choice["logprobs"]["content"]
        assert [token["token"] for token in tokens] == [token["token"] for token in expected]
        assert all(len(token["top_logprobs"]) == 2 for token in tokens)
        assert [token["logprob"] for token in tokens] == pytest.approx(
            [token["logprob"] for token in expected], abs=1e-3
        )
        assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]  # type: ignore[index]
        assert response["lora"] == chat["lora"]


def test_earlier_turns_and_instructions_are_messages(server: RunningServer) -> None:
    first = respond(server, "hello")
    given = [
        {"type": "message", "role": "user", "content": "hello"},
        *first.output,
        {"type": "message", "role": "user", "content": [QUESTION], "status": "completed"},
    ]
    response = respond(server, given, instructions="be short")
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "what is it?"},
    ]
    with server.client as client:
        chat = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=4)  # type: ignore[arg-type]
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None and chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.instructions == "be short"


def test_a_response_repeats_its_request(server: RunningServer) -> None:
    fields = {
        "metadata": {"a": "b"},
        "prompt_cache_key": "key",
        "safety_identifier": "me",
        "user": "you",
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "top_p": 0.5,
        "temperature": 0.25,
        "max_output_tokens": 3,
    }
    response = respond(server, "hello", **fields)
    assert {name: getattr(response, name) for name in fields} == fields
    assert response.id.startswith("resp_") and response.output[0].id.startswith("msg_")  # type: ignore[union-attr]
    assert response.model == "tiny"
    with server.client as client:
        plain = client.responses.create(input="hello", max_output_tokens=1)
    assert (plain.temperature, plain.top_p, plain.tool_choice, plain.metadata) == (1.0, 1.0, "auto", {})
    assert plain.model == "tiny" and plain.store is False  # type: ignore[attr-defined]


def test_the_status_shows_how_the_output_ended(server: RunningServer) -> None:
    cut = respond(server, "hello", max_output_tokens=8)
    assert cut.status == cut.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert cut.incomplete_details is not None and cut.incomplete_details.reason == "max_output_tokens"
    assert cut.usage is not None and cut.usage.output_tokens == 8 and cut.completed_at is None
    stop = cut.output_text[3]
    ended = respond(server, "hello", max_output_tokens=8, extra_body={"stop": stop})
    assert ended.status == ended.output[0].status == "completed"  # type: ignore[union-attr]
    assert ended.incomplete_details is None and ended.completed_at is not None
    assert ended.output_text == cut.output_text[: cut.output_text.index(stop)]


def test_repeated_prompts_are_counted_as_cached(server: RunningServer) -> None:
    usages = [respond(server, "the same words again and again " * 4).usage for _ in range(2)]
    assert usages[1] is not None and usages[1].input_tokens_details.cached_tokens > 0
    assert usages[1].total_tokens == usages[1].input_tokens + usages[1].output_tokens


def test_media_choose_the_adapter(server: RunningServer, wav: bytes, png: bytes) -> None:
    reasons = {
        "default:audio": user(input_audio_part(wav), QUESTION),
        "default:image": user(QUESTION, image_part(png)),
        "conflict:audio+image": user(input_audio_part(wav), image_part(png)),
        "none": "what is it?",
    }
    for reason, given in reasons.items():
        response = respond(server, given)
        assert lora_of(response)["reason"] == reason
        base = respond(server, given, extra_body={"lora": []})
        assert lora_of(base)["reason"] == "explicit:base"
        assert (response.output_text != base.output_text) == reason.startswith("default:")
    assert "audio and image" in lora_of(respond(server, reasons["conflict:audio+image"]))["warning"]


def test_a_named_adapter_wins(server: RunningServer, wav: bytes) -> None:
    given = user(input_audio_part(wav), QUESTION)
    by_model = respond(server, given, model="words")
    by_field = respond(server, given, extra_body={"lora": "words"})
    assert lora_of(by_model) == lora_of(by_field)
    assert (lora_of(by_model)["adapter"], lora_of(by_model)["reason"]) == ("words", "explicit")
    assert (by_model.model, by_field.model) == ("words", "tiny")
    assert by_model.output_text == by_field.output_text != respond(server, given).output_text


@pytest.mark.parametrize("is_stream", [False, True])
def test_headers_name_the_adapter(server: RunningServer, wav: bytes, is_stream: bool) -> None:
    body = {"input": user(input_audio_part(wav)), "max_output_tokens": 1, "stream": is_stream}
    answer = httpx.post(f"{server.address}/v1/responses", json=body, timeout=60)
    assert answer.headers["x-mmlora-adapter"] == "audio"
    assert answer.headers["x-mmlora-reason"] == "default:audio"


def test_sampling_fields_reach_the_engine(server: RunningServer) -> None:
    greedy = respond(server, "a story", max_output_tokens=16).output_text
    hot = {"temperature": 5.0, "max_output_tokens": 16}
    seeded = [respond(server, "a story", extra_body={"seed": 7}, **hot).output_text for _ in range(2)]
    assert seeded[0] == seeded[1] != greedy
    assert respond(server, "a story", extra_body={"top_k": 1}, **hot).output_text == greedy


def test_options_reach_the_template_and_the_processor(server: RunningServer, wav: bytes) -> None:
    usual, short = [
        respond(server, "hello", extra_body={"chat_template_kwargs": {"add_generation_prompt": is_asked}}).usage
        for is_asked in (True, False)
    ]
    assert usual is not None and short is not None and usual.input_tokens > short.input_tokens
    body = {"input": user(input_audio_part(wav)), "mm_processor_kwargs": {"unknown_option": 1}}
    assert "unknown_option" in refuse(server, body)["message"]


def test_every_shared_field_is_supported_or_refused() -> None:
    """A field added to the shared request model must not be silently ignored here."""
    read = {
        "model",
        "lora",
        "stream",
        "stream_options",
        "mm_processor_kwargs",
        "priority",
        "cache_salt",
        "request_id",
        "structured_outputs",
        *SAMPLING_FIELDS,
    }
    refused = {"max_tokens", "prompt_logprobs", "response_format", "return_token_ids"}
    assert GenerationRequest.model_fields.keys() - read == refused


def test_the_output_follows_a_schema(server: RunningServer) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    text = {"format": {"type": "json_schema", "name": "picture", "schema": schema, "strict": True}}
    # Without this, the model generates whitespace between two JSON tokens forever.
    spaces = [token for space in " \t\n\r" for token in server.llm.tokenizer.encode(space, add_special_tokens=False)]
    options: dict[str, Any] = {
        "max_output_tokens": 64,
        "extra_body": {"logit_bias": dict.fromkeys(map(str, spaces), -100)},
    }
    response = respond(server, "hello", text=text, **options)
    assert json.loads(response.output_text)["colour"] in ("red", "blue")
    assert response.to_dict()["text"]["format"] == text["format"]  # type: ignore[index,call-overload]
    options["extra_body"]["structured_outputs"] = {"json": schema}
    assert respond(server, "hello", **options).output_text == response.output_text


def without_names(response: Response) -> dict[str, Any]:
    """Return the fields that are equal in two responses to the same request."""
    content = response.to_dict()
    for name in ("id", "created_at", "completed_at"):
        content.pop(name)
    message: Any = content["output"][0]  # type: ignore[index]
    message.pop("id")
    message["content"][0].pop("parsed", None)  # added by the client
    return content


def test_a_stream_has_the_whole_response(server: RunningServer, wav: bytes) -> None:
    options: dict[str, Any] = {"max_output_tokens": 12, "include": [LOGPROBS], "top_logprobs": 2}
    given = user(input_audio_part(wav), QUESTION)
    respond(server, given, **options)  # puts the prompt into the prefix cache
    whole = respond(server, given, **options)
    events = stream(server, given, **options)
    kinds = checked(events)
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"} and len(kinds) > 12
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    first, last = events[0], events[-1]
    assert isinstance(first, ResponseCreatedEvent) and isinstance(last, ResponseIncompleteEvent)
    assert lora_of(first.response) == lora_of(whole) and lora_of(whole)["adapter"] == "audio"
    assert first.response.status == "in_progress" and first.response.output == []
    assert first.response.id == last.response.id
    assert without_names(last.response) == without_names(whole)
    deltas = [event for event in events if isinstance(event, ResponseTextDeltaEvent)]
    assert "".join(delta.delta for delta in deltas) == whole.output_text
    logprobs = [logprob.to_dict() for delta in deltas for logprob in delta.logprobs]
    assert logprobs == whole.to_dict()["output"][0]["content"][0]["logprobs"]  # type: ignore[index]


def test_events_are_named_and_the_last_one_ends_the_stream(server: RunningServer) -> None:
    body = {"input": "hello", "max_output_tokens": 2, "stream": True}
    answer = httpx.post(f"{server.address}/v1/responses", json=body, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.strip().split("\n\n")
    for block in blocks:
        name, data = block.split("\n")
        assert name.startswith("event: ") and f'"type":"{name.removeprefix("event: ")}"' in data
    assert blocks[-1].startswith("event: response.incomplete")


def test_the_stream_helper_of_the_client_returns_the_whole_response(server: RunningServer) -> None:
    cut = respond(server, "hello", max_output_tokens=8)
    options: dict[str, Any] = {"max_output_tokens": 8, "extra_body": {"stop": cut.output_text[-3:-1]}}
    whole = respond(server, "hello", **options)
    with (
        server.client as client,
        client.responses.stream(model="tiny", input="hello", temperature=0, **options) as events,
    ):
        snapshots = [event.snapshot for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert final.status == "completed"
    assert snapshots[-1] == final.output_text == whole.output_text
    assert without_names(final) == without_names(whole)


def test_a_client_that_disconnects_from_a_stream_aborts_its_request(
    server: RunningServer, aborted: list[RequestOutput]
) -> None:
    with server.client as client:
        events = client.responses.create(input="a story", stream=True, extra_body={"ignore_eos": True})
        next(iter(events))
        events.close()
    wait_until_idle(server)
    assert [output.outputs[0].finish_reason for output in aborted] == ["abort"]


def test_a_client_that_disconnects_before_the_response_aborts_its_request(
    server: RunningServer, aborted: list[RequestOutput]
) -> None:
    body = {"input": "a story", "max_output_tokens": 480, "ignore_eos": True}
    leave_before_answer(server, "/v1/responses", body)
    assert [output.outputs[0].finish_reason for output in aborted] == ["abort"]


def test_a_failure_in_the_middle_of_a_stream_ends_it(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, calls = server.llm.engine.runner, []
    run = runner.run

    def fail_on_third(scheduled: Any) -> Any:
        calls.append(scheduled)
        if len(calls) == 3:
            raise MMLoRAError("broken on purpose")
        return run(scheduled)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", fail_on_third)
        events = stream(server, "a story", max_output_tokens=64, extra_body={"ignore_eos": True})
    assert checked(events)[-1] == "response.failed"
    last = events[-1]
    assert isinstance(last, ResponseFailedEvent) and last.response.status == "failed"
    assert last.response.error is not None
    assert (last.response.error.code, last.response.error.message) == ("server_error", "internal server error")
    deltas = [event.delta for event in events if isinstance(event, ResponseTextDeltaEvent)]
    assert last.response.output_text == "".join(deltas)
    assert respond(server, "still there?").usage is not None


def test_fields_without_effect_are_accepted(server: RunningServer) -> None:
    respond(
        server,
        "hello",
        background=False,
        store=True,
        service_tier="auto",
        truncation="disabled",
        tools=[],
        tool_choice="auto",
        previous_response_id=None,
        include=["reasoning.encrypted_content"],
        reasoning={"effort": None, "summary": None},
        text={"format": {"type": "text"}, "verbosity": "medium"},
        extra_body={"n": 1, "stream": None},
    )


def refuse(server: RunningServer, body: Any, status: int = 400) -> dict[str, Any]:
    response = httpx.post(f"{server.address}/v1/responses", json=body, timeout=60)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert len(str(error)) < 600
    return dict(error)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "s"}}}, "text.format"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"style": "plain"}}, "text.style"),
        ({"text": "plain"}, "text"),
        ({"include": ["everything"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": -1, "include": [LOGPROBS]}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 4}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(key): "" for key in range(17)}}, "metadata"),
        ({"user": "x" * 513}, "user"),
        ({"prewarm": True}, "prewarm"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 10**6 * "x", "lora": 3}, "lora"),
    ],
    ids=str,
)
def test_an_unsupported_field_is_named(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    error = refuse(server, {"input": "hello", **fields})
    assert error["param"] == param and param.partition(".")[0] in error["message"]


@pytest.mark.parametrize(
    ("item", "place"),
    [
        ("hello", "input[1]"),
        ({"type": "function_call_output", "call_id": "c", "output": "3"}, "input[1].call_id"),
        ({"type": "item_reference", "id": "msg_1"}, "input[1].type"),
        ({"content": "hello"}, "input[1].role"),
        ({"role": "tool", "content": "hello"}, "input[1].role"),
        ({"role": ["user"], "content": "hello"}, "input[1].role"),
        ({"role": "user"}, "input[1].content"),
        ({"role": "user", "content": []}, "input[1].content"),
        ({"role": "user", "content": ["hello"]}, "input[1].content[0]"),
        ({"role": "user", "content": [QUESTION, {"text": "hello"}]}, "input[1].content[1].type"),
        ({"role": "user", "content": [QUESTION, {"type": []}]}, "input[1].content[1].type"),
        ({"role": "user", "content": [QUESTION, text_part("hello")]}, "input[1].content[1].type"),
        ({"role": "user", "content": [QUESTION, {"type": "input_file"}]}, "input[1].content[1].type"),
        ({"role": "user", "content": [QUESTION, {"type": "input_text"}]}, "input[1].content[1].text"),
        ({"role": "user", "content": [{**QUESTION, "tone": "kind"}]}, "input[1].content[0]"),
        ({"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}, "input[1].content[0]"),
        ({"role": "user", "content": [{"type": "input_image"}]}, "input[1].content[0].image_url"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "input[1].content[0].input_audio"),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
            "input[1].content[0].input_audio.data",
        ),
        ({"role": "assistant", "content": [{"type": "refusal"}]}, "input[1].content[0].refusal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_item_is_named_by_its_path(server: RunningServer, item: Any, place: str) -> None:
    error = refuse(server, {"input": [{"role": "user", "content": "hello"}, item]})
    assert error["param"] == place and place in error["message"]


def test_media_limits_apply(server: RunningServer, wav: bytes, png: bytes) -> None:
    broken = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    assert refuse(server, {"input": user(broken)})["code"] == "media_error"
    assert "limit_mm_per_prompt" in refuse(server, {"input": user(image_part(png), image_part(png))})["message"]
    assert "audio, but image" in refuse(server, {"input": user({**image_part(wav)})})["message"]


@pytest.mark.parametrize(("field", "value"), [("model", "gpt-9"), ("lora", "gpt-9")])
def test_an_unknown_name_is_404(server: RunningServer, field: str, value: str) -> None:
    assert refuse(server, {"input": "hello", field: value}, 404)["param"] == field


def test_responses_are_not_stored(server: RunningServer) -> None:
    """There are no routes to retrieve responses."""
    response = respond(server, "hello", store=True)
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
        answer = httpx.request(method, f"{server.address}/v1/responses/{response.id}{path}")
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_responses_appear_in_metrics_and_the_openapi_document(server: RunningServer) -> None:
    respond(server, "hello")
    metrics = httpx.get(f"{server.address}/metrics").text
    assert 'route="/v1/responses",status="200"' in metrics
    document = httpx.get(f"{server.address}/openapi.json").json()
    schema = document["paths"]["/v1/responses"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["input"]
    assert {"instructions", "max_output_tokens", "lora", "stream", "include"} <= schema["properties"].keys()
