"""Send the outputs of the engine as an HTTP response: one JSON object or a stream of server-sent events."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mmlora.errors import MMLoRAError
from mmlora.outputs import RequestOutput
from mmlora.server.http.admission import Deadline
from mmlora.server.openai.output import ResponseBuilder, lora_headers

logger = logging.getLogger(__name__)
Outputs = AsyncIterator[RequestOutput]
MAX_INLINE_ENTRIES: Final = 2048  # larger responses are built outside the event loop
T = TypeVar("T")


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
