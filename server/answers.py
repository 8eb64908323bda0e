"""OpenAI's answer objects, built from `RequestOutput`s: the whole completion, or its chunks."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

from mmlora.errors import EngineDeadError, RequestError
from mmlora.outputs import CompletionOutput, LoRAChoice, RequestOutput, TokenLogprobs

logger = logging.getLogger(__name__)
Json = dict[str, Any]


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


class Answer:
    """One chat completion in the making.

    Args:
        request_id: the answer's id.
        model: what the client asked for.
        top_logprobs: alternatives to report at each token; None for no log probabilities.
    """

    def __init__(self, request_id: str, model: str, top_logprobs: int | None) -> None:
        self._request_id = request_id
        self._model = model
        self._top_logprobs = top_logprobs
        self._created = int(time.time())
        self._finished: set[int] = set()
        self._num_tokens = 0

    def complete(self, outputs: list[RequestOutput]) -> Json:
        """The whole answer from all deltas of its request."""
        last = outputs[-1]
        self._num_tokens = sum(len(part.token_ids) for output in outputs for part in output.outputs)
        return {
            **self._head("chat.completion", last.lora),
            "choices": [self._choice([o.outputs[i] for o in outputs]) for i in range(len(last.outputs))],
            "usage": self._usage(last),
        }

    def first_chunks(self, output: RequestOutput, *, include_usage: bool) -> Iterator[Json]:
        """One chunk per choice that says who speaks, and which adapter was applied."""
        for completion in output.outputs:
            delta = {"role": "assistant", "content": ""}
            yield self._chunk(completion.index, delta, None, None, output.lora, include_usage)

    def chunks(self, output: RequestOutput, *, include_usage: bool) -> Iterator[Json]:
        """What is new since the last output; a choice's last chunk names the adapter again."""
        for completion in output.outputs:
            if completion.index in self._finished:
                continue
            self._num_tokens += len(completion.token_ids)
            logprobs = self._logprobs([completion])
            if completion.text or (logprobs and logprobs["content"]):
                delta = {"content": completion.text}
                yield self._chunk(completion.index, delta, logprobs, None, None, include_usage)
            if completion.finish_reason is not None:
                self._finished.add(completion.index)
                yield self._chunk(completion.index, {}, None, completion, output.lora, include_usage)

    def usage_chunk(self, output: RequestOutput) -> Json:
        """The last chunk of a stream that asked for `include_usage`."""
        return {**self._head("chat.completion.chunk", None), "choices": [], "usage": self._usage(output)}

    def _head(self, kind: str, choice: LoRAChoice | None) -> Json:
        head: Json = {"id": self._request_id, "object": kind, "created": self._created, "model": self._model}
        return head if choice is None else {**head, "lora": asdict(choice)}

    def _choice(self, parts: list[CompletionOutput]) -> Json:
        return {
            "index": parts[-1].index,
            "message": {"role": "assistant", "content": "".join(part.text for part in parts), "refusal": None},
            "logprobs": self._logprobs(parts),
            "finish_reason": parts[-1].finish_reason,
            "stop_reason": parts[-1].stop_reason,
        }

    def _chunk(
        self,
        index: int,
        delta: Json,
        logprobs: Json | None,
        finished: CompletionOutput | None,
        lora: LoRAChoice | None,
        include_usage: bool,
    ) -> Json:
        choice: Json = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if finished is not None:
            choice |= {"finish_reason": finished.finish_reason, "stop_reason": finished.stop_reason}
        usage = {"usage": None} if include_usage else {}
        return {**self._head("chat.completion.chunk", lora), "choices": [choice], **usage}

    def _usage(self, output: RequestOutput) -> Json:
        num_prompt = len(output.prompt_token_ids)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_tokens,
            "total_tokens": num_prompt + self._num_tokens,
            "prompt_tokens_details": {"cached_tokens": output.num_cached_tokens},
        }

    def _logprobs(self, parts: Iterable[CompletionOutput]) -> Json | None:
        if self._top_logprobs is None:
            return None
        content = [
            self._token_logprobs(token, top)
            for part in parts
            for token, top in zip(part.token_ids, part.logprobs or (), strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token_logprobs(self, token_id: int, top: TokenLogprobs) -> Json:
        ranked = sorted(top.values(), key=lambda entry: entry.rank)[: self._top_logprobs]
        return {
            **_token(top[token_id].decoded_token, top[token_id].logprob),
            "top_logprobs": [_token(entry.decoded_token, entry.logprob) for entry in ranked],
        }


def _token(text: str, logprob: float) -> Json:
    """A token's entry; the bytes of one that is only part of a character are not known from its text."""
    is_partial = "\N{REPLACEMENT CHARACTER}" in text
    # JSON knows no infinity; OpenAI's floor for "impossible" is -9999.
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": None if is_partial else list(text.encode())}
