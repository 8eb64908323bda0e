"""`ResponsesAnswer`: OpenAI's response object, whole or in typed events."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from mmlora.outputs import CompletionOutput, LoRAChoice, RequestOutput
from mmlora.sampling_params import SamplingParams
from mmlora.server.answers import Answer, Json, count_tokens, event
from mmlora.server.chat_answers import list_logprobs
from mmlora.server.errors import error_body
from mmlora.server.responses_protocol import ResponsesRequest


class ResponsesAnswer(Answer):
    """One response in the making: a single message with a single part of text.

    Args:
        request_id: the response's id, `resp_…`.
        model: what the client asked for.
        asked: the request, of which a response repeats much.
        defaults: the model's own, for what the request leaves out.
    """

    def __init__(self, request_id: str, model: str, asked: ResponsesRequest, defaults: SamplingParams) -> None:
        message_id = request_id.replace("resp_", "msg_", 1)
        self._num_top = asked.num_logprobs
        self._outputs: list[RequestOutput] = []
        self._num_events = 0
        self._head = {
            "id": request_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **_echo(asked, defaults),
        }
        self._item = {"id": message_id, "type": "message", "role": "assistant"}
        self._part_place = {"item_id": message_id, "output_index": 0, "content_index": 0}

    def complete(self, outputs: list[RequestOutput]) -> Json:
        """The whole response from all deltas."""
        self._outputs = outputs
        return self._response(self._status, self._message(self._status))

    def lora(self, outputs: Iterable[RequestOutput]) -> LoRAChoice:
        """What was chosen."""
        return next(iter(outputs)).lora

    def events(self, output: RequestOutput) -> Iterator[str]:
        """What is new since the last output; the first events tell of the response and so of the adapter."""
        is_first = not self._outputs
        self._outputs.append(output)
        if is_first:
            yield from self._opening()
        text, logprobs = output.outputs[0].text, self._logprobs(output.outputs)
        if text or logprobs:
            yield self._event("response.output_text.delta", **self._part_place, delta=text, logprobs=logprobs)

    def last_events(self) -> Iterator[str]:
        """The whole text, the part, the message and the response that hold it."""
        status = self._status
        message = self._message(status)
        part = message["content"][0]
        text, logprobs = part["text"], part["logprobs"]
        yield self._event("response.output_text.done", **self._part_place, text=text, logprobs=logprobs)
        yield self._event("response.content_part.done", **self._part_place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=message)
        yield self._event(f"response.{status}", response=self._response(status, message))

    def failure(self, error: Exception) -> Iterator[str]:
        """The response as far as it came, and why it ended."""
        told = error_body(error)["error"]
        reason = {"code": "server_error", "message": told["message"], "type": told["type"]}
        response = self._response("failed", self._message("incomplete"), reason)
        yield self._event("response.failed", response=response)

    def _opening(self) -> Iterator[str]:
        response = self._response("in_progress", None)
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        item = {**self._item, "status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._part_place, part=_part("", []))

    @property
    def _status(self) -> str:
        return "incomplete" if self._outputs[-1].outputs[0].finish_reason == "length" else "completed"

    def _response(self, status: str, message: Json | None, error: Json | None = None) -> Json:
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [message] if message is not None else [],
            "usage": self._usage() if message is not None else None,
            "lora": asdict(self._outputs[-1].lora),
        }

    def _message(self, status: str) -> Json:
        deltas = [output.outputs[0] for output in self._outputs]
        text = "".join(delta.text for delta in deltas)
        return {**self._item, "status": status, "content": [_part(text, self._logprobs(deltas))]}

    def _logprobs(self, deltas: list[CompletionOutput]) -> list[Json]:
        if self._num_top is None:
            return []
        entries = list_logprobs(deltas, self._num_top)
        return [
            {**_with_bytes(entry), "top_logprobs": list(map(_with_bytes, entry["top_logprobs"]))} for entry in entries
        ]

    def _usage(self) -> Json:
        num_tokens = sum(len(output.outputs[0].token_ids) for output in self._outputs)
        counts = count_tokens(self._outputs[-1:], num_tokens)
        return {
            "input_tokens": counts["prompt_tokens"],
            # Every prompt may be kept in the prefix cache; OpenAI's second count is of what it costs to have it kept.
            "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }

    def _event(self, kind: str, **content: object) -> str:
        number = self._num_events
        self._num_events += 1
        return event({"type": kind, "sequence_number": number, **content}, kind)


def _part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _with_bytes(token: Json) -> Json:
    """Here OpenAI's types have no null for bytes that are not known."""
    return {**token, "bytes": token["bytes"] or []}


def _echo(asked: ResponsesRequest, defaults: SamplingParams) -> Json:
    """What a response repeats of its request, with what holds where it says nothing."""
    return {
        "background": False,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": None,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": defaults.temperature if asked.temperature is None else asked.temperature,
        "text": {"format": {"type": "text"}, "verbosity": "medium", **_given(asked.text or {})},
        "tool_choice": asked.tool_choice,
        "tools": [],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": defaults.top_p if asked.top_p is None else asked.top_p,
        "truncation": "disabled",
        "user": asked.user,
    }


def _given(options: Json) -> Json:
    return {name: value for name, value in options.items() if value is not None}
