"""`ResponseObjectBuilder`: response objects of OpenAI's Responses API, whole or in typed events."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from mmlora.outputs import RequestOutput
from mmlora.sampling_params import SamplingParams
from mmlora.server.errors import error_body
from mmlora.server.openai.logprobs import list_logprobs
from mmlora.server.openai.output import Json, ResponseBuilder, count_tokens, event
from mmlora.server.openai.responses.items import Event, OutputItems
from mmlora.server.openai.responses.protocol import ResponsesRequest

_TOOL: Json = {"description": None, "parameters": None, "strict": None}


class ResponseObjectBuilder(ResponseBuilder):
    """Builds one response object.

    Args:
        request_id: the response's id, `resp_…`.
        model: model name in the response.
        request: many of its fields are repeated in the response.
        defaults: the model's default sampling parameters.
        items: the output items, still empty.
    """

    def __init__(
        self, request_id: str, model: str, request: ResponsesRequest, defaults: SamplingParams, items: OutputItems
    ) -> None:
        self._num_top = request.num_logprobs
        self._outputs: list[RequestOutput] = []
        self._num_events = 0
        self._head = {
            "id": request_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **_echo(request, defaults),
        }
        self._items = items

    def complete(self, outputs: list[RequestOutput]) -> Json:
        """Return the whole response, built from all output deltas."""
        self._outputs = outputs
        for output in outputs:
            self._feed(output)
        self._finish()
        return self._response(self._status)

    def events(self, output: RequestOutput) -> Iterator[str]:
        """Yield the events of one output delta; the first two contain the response object with the adapter."""
        is_first = not self._outputs
        self._outputs.append(output)
        if is_first:
            response = self._response("in_progress")
            yield self._event("response.created", response=response)
            yield self._event("response.in_progress", response=response)
        yield from self._events(self._feed(output))

    def last_events(self) -> Iterator[str]:
        """Yield the events that end the last item, and the whole response."""
        yield from self._events(self._finish())
        yield self._event(f"response.{self._status}", response=self._response(self._status))

    def failure(self, error: Exception) -> Iterator[str]:
        """Yield the response so far, with the error."""
        body = error_body(error)["error"]
        reason = {"code": "server_error", "message": body["message"], "type": body["type"]}
        yield self._event("response.failed", response=self._response("failed", reason))

    def _feed(self, output: RequestOutput) -> list[Event]:
        delta = output.outputs[0]
        logprobs = list_logprobs([delta], self._num_top) if self._num_top is not None else []
        return self._items.feed(output, list(map(_token, logprobs)))

    def _finish(self) -> list[Event]:
        return self._items.finish(self._status, is_stopped=self._outputs[-1].outputs[0].stop_reason is not None)

    @property
    def _status(self) -> str:
        return "incomplete" if self._outputs[-1].outputs[0].finish_reason == "length" else "completed"

    def _response(self, status: str, error: Json | None = None) -> Json:
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items.content("incomplete"),
            "usage": self._usage() if status != "in_progress" else None,
            "lora": asdict(self._outputs[-1].lora),
        }

    def _usage(self) -> Json:
        num_tokens = sum(len(output.outputs[0].token_ids) for output in self._outputs)
        counts = count_tokens(self._outputs[-1:], num_tokens)
        return {
            "input_tokens": counts["prompt_tokens"],
            # OpenAI bills writes to the prompt cache; the prefix cache here stores every prompt for free.
            "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._items.num_reasoning_tokens},
            "total_tokens": counts["total_tokens"],
        }

    def _events(self, events: Iterable[Event]) -> Iterator[str]:
        return (self._event(kind, **content) for kind, content in events)

    def _event(self, kind: str, **content: object) -> str:
        number = self._num_events
        self._num_events += 1
        return event({"type": kind, "sequence_number": number, **content}, kind)


def _token(entry: Json) -> Json:
    """Return an entry with lists for unknown bytes, since OpenAI's types of this API do not allow null there."""
    return {**_with_bytes(entry), "top_logprobs": list(map(_with_bytes, entry["top_logprobs"]))}


def _with_bytes(token: Json) -> Json:
    return {**token, "bytes": token["bytes"] or []}


def _echo(request: ResponsesRequest, defaults: SamplingParams) -> Json:
    """Return the fields of the request that a response repeats, with defaults for those not set."""
    name = request.tooling.name if request.tooling is not None else None
    return {
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": request.effort, "summary": (request.reasoning or {}).get("summary")},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": defaults.temperature if request.temperature is None else request.temperature,
        "text": {"format": {"type": "text"}, "verbosity": "medium", **_given(request.text or {})},
        "tool_choice": {"type": "function", "name": name} if name is not None else request.tool_choice or "auto",
        "tools": [{**_TOOL, **_given(tool)} for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": defaults.top_p if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }


def _given(options: Json) -> Json:
    return {name: value for name, value in options.items() if value is not None}
