"""OpenAI's answer objects, built from `RequestOutput`s: what all endpoints that generate text have in common."""

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, ClassVar
from urllib.parse import quote

from starlette.responses import Response

from mmlora.errors import EngineDeadError, RequestError
from mmlora.outputs import CompletionOutput, LoRAChoice, RequestOutput
from mmlora.processors.modalities import MODALITIES
from mmlora.server.errors import UTF8JSONResponse, error_body

logger = logging.getLogger(__name__)
Json = dict[str, Any]
DONE = "data: [DONE]\n\n"


def lora_headers(choice: LoRAChoice) -> dict[str, str]:
    """`x-mmlora-reason`, and `x-mmlora-adapter` (percent-encoded) unless the base model answered."""
    headers = {"x-mmlora-reason": choice.reason}
    if choice.adapter is not None:
        headers["x-mmlora-adapter"] = quote(choice.adapter, safe="/+:@,")
    return headers


def raise_failure(output: RequestOutput) -> None:
    """Raise what ended a request early, if anything did.

    Raises:
        MMLoRAError: the request failed, or the engine was shut down under it.
    """
    if output.error is not None:
        if not isinstance(output.error, RequestError):  # the client is not told more than that it failed
            logger.error("request %s failed: %s", output.request_id, output.error)
        raise output.error
    if any(completion.finish_reason == "abort" for completion in output.outputs):
        raise EngineDeadError("the server is shutting down; the answer is not complete")


def finite(logprob: float) -> float:
    """A log probability as JSON has it: it knows no infinity; OpenAI's floor for "impossible" is -9999."""
    return max(logprob, -9999.0)


def count_tokens(outputs: Iterable[RequestOutput], num_completion_tokens: int) -> Json:
    """The `usage` of an answer.

    Args:
        outputs: one of each prompt.
        num_completion_tokens: of all answers.
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


class Answer(ABC):
    """One answer in the making: it takes the outputs of the engine, whole or one by one as a stream brings them."""

    @abstractmethod
    def complete(self, outputs: list[RequestOutput]) -> Json:
        """The whole answer from all deltas of its prompts."""

    def response(self, outputs: list[RequestOutput], headers: Mapping[str, str]) -> Response:
        """The whole answer over HTTP."""
        return UTF8JSONResponse(self.complete(outputs), headers=headers)

    @abstractmethod
    def lora(self, outputs: Iterable[RequestOutput]) -> LoRAChoice:
        """What the headers tell of the adapter."""

    @abstractmethod
    def events(self, output: RequestOutput) -> Iterator[str]:
        """What is new since the last output, as server-sent events."""

    @abstractmethod
    def last_events(self) -> Iterator[str]:
        """What ends a stream that went well."""

    def failure(self, error: Exception) -> Iterator[str]:
        """What ends a stream in an error."""
        yield event(error_body(error))
        yield DONE


def event(data: Json, name: str | None = None) -> str:
    """Write one server-sent event."""
    head = f"event: {name}\n" if name is not None else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n"


class ChoicesAnswer(Answer):
    """An answer of numbered choices, to one prompt or to several that were sent together.

    Args:
        request_id: the answer's id.
        model: what the client asked for.
        include_usage: a stream ends with the token counts.
    """

    WHOLE: ClassVar[str]
    CHUNK: ClassVar[str]

    def __init__(self, request_id: str, model: str, *, include_usage: bool = False) -> None:
        self._include_usage = include_usage
        self._request_id = request_id
        self._model = model
        self._created = int(time.time())
        self._begun: set[int] = set()
        self._finished: set[int] = set()
        self._last: dict[str, RequestOutput] = {}
        self._num_tokens = 0

    def complete(self, outputs: list[RequestOutput]) -> Json:
        """The whole answer from all deltas of its prompts."""
        deltas: dict[str, list[RequestOutput]] = {}
        for output in outputs:
            self._count(output, output.outputs)
            deltas.setdefault(output.request_id, []).append(output)
        first, choices = self.lora(outputs), []
        for parts in sorted(deltas.values(), key=lambda parts: self._index(parts[0], 0)):
            for place in range(len(parts[0].outputs)):
                choice = self._choice(parts[-1], [part.outputs[place] for part in parts])
                # One answer names one adapter; a prompt for which another one was chosen says so itself.
                own = {} if parts[-1].lora == first else {"lora": asdict(parts[-1].lora)}
                choices.append({**choice, **own})
        return {**self._head(self.WHOLE, first), "choices": choices, "usage": self._usage()}

    def lora(self, outputs: Iterable[RequestOutput]) -> LoRAChoice:
        """What was chosen for the first prompt, which is told of the whole answer."""
        return min(outputs, key=lambda output: self._index(output, 0)).lora

    def events(self, output: RequestOutput) -> Iterator[str]:
        """What is new since the last output; a choice's first and last chunk name the adapter."""
        return map(event, self._chunks(output))

    def last_events(self) -> Iterator[str]:
        """The token counts, if they were asked for, and the end."""
        if self._include_usage:
            yield event({**self._head(self.CHUNK, None), "choices": [], "usage": self._usage()})
        yield DONE

    def _chunks(self, output: RequestOutput) -> Iterator[Json]:
        for completion in output.outputs:
            index = self._index(output, completion.index)
            if index not in self._begun:
                self._begun.add(index)
                yield self._chunk(index, self._opening(output), output.lora)
        new = [part for part in output.outputs if self._index(output, part.index) not in self._finished]
        self._count(output, new)
        for completion in new:
            index = self._index(output, completion.index)
            content = self._news(output, completion)
            if content is not None:
                yield self._chunk(index, content, None)
            if completion.finish_reason is not None:
                self._finished.add(index)
                yield self._chunk(index, self._closing(completion), output.lora)

    @abstractmethod
    def _choice(self, last: RequestOutput, parts: list[CompletionOutput]) -> Json:
        """A whole choice from its deltas."""

    @abstractmethod
    def _opening(self, output: RequestOutput) -> Json:
        """What a choice's first chunk holds."""

    @abstractmethod
    def _news(self, output: RequestOutput, completion: CompletionOutput) -> Json | None:
        """What the chunk of a delta holds; None when there is nothing to tell."""

    @abstractmethod
    def _closing(self, completion: CompletionOutput) -> Json:
        """What a choice's last chunk holds."""

    def _index(self, output: RequestOutput, place: int) -> int:
        """A choice's index from its place among the choices of its prompt."""
        return place

    def _count(self, output: RequestOutput, new: Iterable[CompletionOutput]) -> None:
        self._last[output.request_id] = output
        self._num_tokens += sum(len(completion.token_ids) for completion in new)

    def _usage(self) -> Json:
        return count_tokens(self._last.values(), self._num_tokens)

    def _head(self, kind: str, choice: LoRAChoice | None) -> Json:
        head: Json = {"id": self._request_id, "object": kind, "created": self._created, "model": self._model}
        return head if choice is None else {**head, "lora": asdict(choice)}

    def _chunk(self, index: int, content: Json, lora: LoRAChoice | None) -> Json:
        choice: Json = {"index": index, "logprobs": None, "finish_reason": None, **content}
        usage = {"usage": None} if self._include_usage else {}
        return {**self._head(self.CHUNK, lora), "choices": [choice], **usage}
