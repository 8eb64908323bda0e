"""Turns outputs of the engine into HTTP responses.

A `ResponseBuilder` builds OpenAI's response objects; `respond_with` sends them whole or as server-sent events.
"""

import asyncio
import json
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Final, TypeVar
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mmlora.errors import EngineDeadError, MMLoRAError, RequestError
from mmlora.outputs import CompletionOutput, LoRAChoice, RequestOutput
from mmlora.processors.modalities import MODALITIES
from mmlora.server.bodies import UTF8JSONResponse
from mmlora.server.errors import error_body
from mmlora.server.http.admission import Deadline
from mmlora.server.openai.protocol import GenerationRequest

logger = logging.getLogger(__name__)
Json = dict[str, Any]
Outputs = AsyncIterator[RequestOutput]
T = TypeVar("T")

DONE: Final = "data: [DONE]\n\n"
MAX_INLINE_ENTRIES: Final = 2048  # larger responses are built outside the event loop


def lora_headers(choice: LoRAChoice) -> dict[str, str]:
    """Return `x-mmlora-reason` and, unless the base model was used, `x-mmlora-adapter` (percent-encoded)."""
    headers = {"x-mmlora-reason": choice.reason}
    if choice.adapter is not None:
        headers["x-mmlora-adapter"] = quote(choice.adapter, safe="/+:@,")
    return headers


def raise_failure(output: RequestOutput) -> None:
    """Raise the error that ended a request early, if there is one.

    Raises:
        MMLoRAError: the request failed, or the engine was shut down while it ran.
    """
    if output.error is not None:
        if not isinstance(output.error, RequestError):  # clients get a generic message
            logger.error("request %s failed: %s", output.request_id, output.error)
        raise output.error
    if any(completion.finish_reason == "abort" for completion in output.outputs):
        raise EngineDeadError("the server is shutting down; the response is incomplete")


def finite(logprob: float) -> float:
    """Return a log probability that JSON can encode; OpenAI's value for minus infinity is -9999."""
    return max(logprob, -9999.0)


def count_tokens(outputs: Iterable[RequestOutput], num_completion_tokens: int) -> Json:
    """Return the `usage` of a response.

    Args:
        outputs: one output per prompt.
        num_completion_tokens: tokens of all choices.
    """
    last = list(outputs)
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in last)
    num_media_tokens = {
        modality: sum(output.num_media_tokens.get(modality, 0) for output in last) for modality in MODALITIES
    }
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(output.num_cached_tokens for output in last),
            **{f"{modality}_tokens": count for modality, count in num_media_tokens.items()},
            "text_tokens": num_prompt_tokens - sum(num_media_tokens.values()),
        },
    }


class ResponseBuilder(ABC):
    """Builds one response, either as a whole or as a stream of server-sent events.

    Attributes:
        repeats_prompt: the response repeats the prompt, so `begin` must be called with its first output.
    """

    repeats_prompt = False

    def begin(self, output: RequestOutput) -> None:
        """Prepare the part that repeats the prompt; takes a while for long prompts."""
        raise NotImplementedError

    @abstractmethod
    def complete(self, outputs: list[RequestOutput]) -> Json:
        """Return the whole response, built from all output deltas."""

    def response(self, outputs: list[RequestOutput], headers: Mapping[str, str]) -> Response:
        """Return the whole HTTP response."""
        return UTF8JSONResponse(self.complete(outputs), headers=headers)

    def lora(self, outputs: Iterable[RequestOutput]) -> LoRAChoice:
        """Return the adapter choice for the headers."""
        return next(iter(outputs)).lora

    @abstractmethod
    def events(self, output: RequestOutput) -> Iterator[str]:
        """Yield the events of one output delta."""

    @abstractmethod
    def last_events(self) -> Iterator[str]:
        """Yield the events that end a successful stream."""

    def failure(self, error: Exception) -> Iterator[str]:
        """Yield the events that end a failed stream."""
        yield event(error_body(error))
        yield DONE


def event(data: Json, name: str | None = None) -> str:
    """Format one server-sent event."""
    head = f"event: {name}\n" if name is not None else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n"


class ChoicesBuilder(ResponseBuilder):
    """Builds a response with numbered choices, for one prompt or a batch of prompts.

    Attributes:
        WHOLE, CHUNK: the `object` of a whole response and of a chunk of a stream.
        EMPTY_DELTA: content of a chunk without text.

    Args:
        request_id: the response's id.
        model: model name in the response.
        fields: the request, which selects token counts and token ids.
    """

    WHOLE: ClassVar[str]
    CHUNK: ClassVar[str]
    EMPTY_DELTA: ClassVar[Json]

    def __init__(self, request_id: str, model: str, fields: GenerationRequest) -> None:
        self._include_usage, self._continuous_usage = fields.include_usage, fields.continuous_usage
        self._has_token_ids = bool(fields.return_token_ids)
        self._request_id = request_id
        self._model = model
        self._created = int(time.time())
        self._begun: set[int] = set()
        self._finished: set[int] = set()
        self._last: dict[str, RequestOutput] = {}
        self._num_tokens: Counter[int] = Counter()  # by choice

    def complete(self, outputs: list[RequestOutput]) -> Json:
        """Return the whole response, built from all output deltas."""
        deltas: dict[str, list[RequestOutput]] = {}
        for output in outputs:
            self._count(output, output.outputs)
            deltas.setdefault(output.request_id, []).append(output)
        first, choices = self.lora(outputs), []
        for parts in sorted(deltas.values(), key=lambda parts: self._index(parts[0], 0)):
            for place in range(len(parts[0].outputs)):
                deltas_of_choice = [part.outputs[place] for part in parts]
                choice = {**self._choice(parts[-1], deltas_of_choice), **self._token_ids(deltas_of_choice)}
                # A response names one adapter; choices of prompts with another adapter name theirs.
                differing = {} if parts[-1].lora == first else {"lora": asdict(parts[-1].lora)}
                choices.append({**choice, **differing})
        return {**self._head(self.WHOLE, first), "choices": choices, "usage": self._usage()}

    def lora(self, outputs: Iterable[RequestOutput]) -> LoRAChoice:
        """Return the choice for the first prompt."""
        return min(outputs, key=lambda output: self._index(output, 0)).lora

    def events(self, output: RequestOutput) -> Iterator[str]:
        """Yield the chunks of one output delta; the first and last chunk of a choice name the adapter."""
        return map(event, self._chunks(output))

    def last_events(self) -> Iterator[str]:
        """Yield the token counts, if requested, and the end marker."""
        if self._include_usage:
            yield event({**self._head(self.CHUNK, None), "choices": [], "usage": self._usage()})
        yield DONE

    def _chunks(self, output: RequestOutput) -> Iterator[Json]:
        for completion in output.outputs:
            index = self._index(output, completion.index)
            if index not in self._begun:
                self._begun.add(index)
                choice = {**self._first_delta(output), **self._token_ids([])}
                yield {**self._chunk(output, index, choice, output.lora), **self._first_fields(output)}
        new = [part for part in output.outputs if self._index(output, part.index) not in self._finished]
        self._count(output, new)
        for completion in new:
            index = self._index(output, completion.index)
            content, token_ids = self._delta(output, completion), self._token_ids([completion])
            if content is None and any(token_ids.values()):  # tokens without text
                content = self.EMPTY_DELTA
            if content is not None:
                yield self._chunk(output, index, {**content, **token_ids}, None)
            if completion.finish_reason is not None:
                self._finished.add(index)
                yield self._chunk(output, index, {**self._last_delta(completion), **self._token_ids([])}, output.lora)

    @abstractmethod
    def _choice(self, last: RequestOutput, parts: list[CompletionOutput]) -> Json:
        """Return a whole choice, built from its deltas."""

    @abstractmethod
    def _first_delta(self, output: RequestOutput) -> Json:
        """Return the content of a choice's first chunk."""

    def _first_fields(self, output: RequestOutput) -> Json:
        """Return fields of a choice's first chunk that are not part of the choice."""
        return {}

    @abstractmethod
    def _delta(self, output: RequestOutput, completion: CompletionOutput) -> Json | None:
        """Return the content of a delta's chunk; None if it is empty."""

    @abstractmethod
    def _last_delta(self, completion: CompletionOutput) -> Json:
        """Return the content of a choice's last chunk."""

    def _index(self, output: RequestOutput, place: int) -> int:
        """Return a choice's index, given its place among the choices of its prompt."""
        return place

    def _count(self, output: RequestOutput, new: Iterable[CompletionOutput]) -> None:
        self._last[output.request_id] = output
        for completion in new:
            self._num_tokens[self._index(output, completion.index)] += len(completion.token_ids)

    def _usage(self) -> Json:
        return count_tokens(self._last.values(), self._num_tokens.total())

    def _token_ids(self, parts: Iterable[CompletionOutput]) -> Json:
        """Return the field of a choice with the ids of its tokens, if requested."""
        return {"token_ids": [i for part in parts for i in part.token_ids]} if self._has_token_ids else {}

    def _prompt_token_ids(self, output: RequestOutput) -> Json:
        """Return the field with the ids of a prompt, if requested."""
        return {"prompt_token_ids": output.prompt_token_ids} if self._has_token_ids else {}

    def _head(self, kind: str, choice: LoRAChoice | None) -> Json:
        head: Json = {"id": self._request_id, "object": kind, "created": self._created, "model": self._model}
        return head if choice is None else {**head, "lora": asdict(choice)}

    def _chunk(self, output: RequestOutput, index: int, content: Json, lora: LoRAChoice | None) -> Json:
        choice: Json = {"index": index, "logprobs": None, "finish_reason": None, **content}
        chunk = {**self._head(self.CHUNK, lora), "choices": [choice]}
        if not self._include_usage:
            return chunk
        return {**chunk, "usage": count_tokens([output], self._num_tokens[index]) if self._continuous_usage else None}


async def respond_with(request: Request, builder: ResponseBuilder, outputs: Outputs, *, is_stream: bool) -> Response:
    """Return the response to a request. When the client disconnects, `outputs` is closed.

    Args:
        request: its body must have been read.
        builder: builds the response.
        outputs: all output deltas.
        is_stream: send server-sent events.

    Raises:
        MMLoRAError: the request failed before the response began, or timed out.
        ClientDisconnect: the client disconnected before that.
    """
    deadline = getattr(request.state, "deadline", None)
    if deadline is not None:
        outputs = _until(deadline, outputs)
    if not is_stream:
        parts = await until_disconnect(request, _collect(outputs))
        headers = lora_headers(builder.lora(parts))
        if sum(map(_num_entries, parts)) <= MAX_INLINE_ENTRIES:
            return builder.response(parts, headers)
        return await asyncio.to_thread(builder.response, parts, headers)
    # The status and the headers, which name the adapter, are known with the first output.
    first = await until_disconnect(request, _next(outputs))
    return EventStream(_events(builder, first, outputs), headers=lora_headers(first.lora))


class EventStream(StreamingResponse):
    """Server-sent events that close their source when the client disconnects, at any point of the stream."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await close(self.body_iterator)


async def close(iterator: object) -> None:
    """Close an async generator now and not at garbage collection; this aborts the request."""
    close_now = getattr(iterator, "aclose", None)
    if close_now is not None:
        await close_now()


async def _events(builder: ResponseBuilder, first: RequestOutput, outputs: Outputs) -> AsyncIterator[str]:
    """Yield the events of a stream. The status was already sent, so an error becomes an event."""
    num_entries = _num_entries(first)
    try:
        yield "".join(builder.events(first))
        async for output in outputs:
            num_entries += _num_entries(output)
            if events := "".join(builder.events(output)):
                yield events
        if num_entries <= MAX_INLINE_ENTRIES:
            yield "".join(builder.last_events())
        else:  # they may repeat the whole response
            yield await asyncio.to_thread(lambda: "".join(builder.last_events()))
    except Exception as error:
        if not isinstance(error, MMLoRAError):
            logger.exception("a stream failed")
        yield "".join(builder.failure(error))
    finally:
        await close(outputs)


def _num_entries(output: RequestOutput) -> int:
    """Return how many tokens and log probabilities an output adds to a response."""
    prompt = sum(len(top or ()) for top in output.prompt_logprobs or ())
    return prompt + sum(len(new.token_ids) + sum(map(len, new.logprobs or ())) for new in output.outputs)


async def _until(deadline: Deadline, outputs: Outputs) -> Outputs:
    """Yield outputs until the deadline.

    Raises:
        Refusal: the deadline has passed; the request is aborted.
    """
    try:
        while True:
            async with asyncio.timeout_at(deadline.end):
                output = await anext(outputs, None)
            if output is None:
                return
            yield output
    except TimeoutError:
        raise deadline.refusal() from None
    finally:
        await close(outputs)


async def _collect(outputs: Outputs) -> list[RequestOutput]:
    try:
        return [output async for output in outputs]
    finally:
        await close(outputs)


async def _next(outputs: Outputs) -> RequestOutput:
    try:
        return await anext(outputs)
    except BaseException:
        await close(outputs)
        raise


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` and cancel it when the client disconnects. The body must have been read before.

    Raises:
        ClientDisconnect: the client disconnected first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
