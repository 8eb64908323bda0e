"""`ChatCompletionBuilder`: chat completions, whole or in chunks."""

from collections.abc import Callable, Iterable

from mmlora.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from mmlora.server.openai.logprobs import list_prompt_logprobs
from mmlora.server.openai.output import ChoicesBuilder, Json, finite
from mmlora.server.openai.tools.parser import Piece, TextParser, ToolCallDelta


class ChatCompletionBuilder(ChoicesBuilder):
    """Builds one chat completion.

    Args:
        request_id, model, include_usage: see `ChoicesBuilder`.
        top_logprobs: alternatives to report at each token; None for no log probabilities.
        prompt_logprobs: the same for the prompt's tokens; for whole responses only.
        prefix: text to repeat at the start of each choice.
        new_parser: creates the tool call parser of one choice; None without tools.
        new_call_id: creates the id of a tool call.
    """

    WHOLE = "chat.completion"
    CHUNK = "chat.completion.chunk"

    def __init__(
        self,
        request_id: str,
        model: str,
        top_logprobs: int | None,
        prompt_logprobs: int | None = None,
        *,
        prefix: str = "",
        include_usage: bool,
        new_parser: Callable[[], TextParser | None] | None,
        new_call_id: Callable[[], str],
    ) -> None:
        super().__init__(request_id, model, include_usage=include_usage)
        self._top_logprobs = top_logprobs
        self._prompt_logprobs = prompt_logprobs
        self._prefix = prefix
        self._new_parser = new_parser
        self._new_call_id = new_call_id
        self._parsers: dict[int, TextParser | None] = {}  # by choice
        self._callers: set[int] = set()  # choices with tool calls

    def complete(self, outputs: list[RequestOutput]) -> Json:
        """Return the whole completion, with the log probabilities of the prompt if requested."""
        completion = super().complete(outputs)
        if self._prompt_logprobs is None:
            return completion
        last = outputs[-1]
        listed = list_prompt_logprobs(last.prompt_token_ids, last.prompt_logprobs or (), self._prompt_logprobs)
        return {**completion, "prompt_logprobs": listed}

    def _choice(self, last: RequestOutput, parts: list[CompletionOutput]) -> Json:
        pieces = self._pieces(parts[-1].index, "".join(part.text for part in parts), is_last=True)
        content = self._prefix + "".join(piece for piece in pieces if isinstance(piece, str))
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        calls = [self._call(piece) for piece in pieces if isinstance(piece, ToolCallDelta)]
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {
            "index": parts[-1].index,
            "message": message,
            "logprobs": self._logprobs(parts),
            "finish_reason": self._finish_reason(parts[-1]),
            "stop_reason": parts[-1].stop_reason,
        }

    def _first_delta(self, output: RequestOutput) -> Json:
        return {"delta": {"role": "assistant", "content": self._prefix}}

    def _delta(self, output: RequestOutput, completion: CompletionOutput) -> Json | None:
        logprobs = self._logprobs([completion])
        pieces = self._pieces(completion.index, completion.text, is_last=completion.finish_reason is not None)
        calls = [{"index": piece.index, **self._call(piece)} for piece in pieces if isinstance(piece, ToolCallDelta)]
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        if not (content or calls or (logprobs and logprobs["content"])):
            return None
        delta = {**({"content": content} if content or not calls else {}), **({"tool_calls": calls} if calls else {})}
        return {"delta": delta, "logprobs": logprobs}

    def _last_delta(self, completion: CompletionOutput) -> Json:
        return {"delta": {}, "finish_reason": self._finish_reason(completion), "stop_reason": completion.stop_reason}

    def _pieces(self, index: int, text: str, *, is_last: bool) -> list[Piece]:
        """Split the next text of a choice into content and tool calls."""
        if index not in self._parsers:
            self._parsers[index] = self._new_parser() if self._new_parser is not None else None
        parser = self._parsers[index]
        if parser is None:
            return [text] if text else []
        pieces = [*parser.feed(text), *(parser.finish() if is_last else ())]
        if any(isinstance(piece, ToolCallDelta) for piece in pieces):
            self._callers.add(index)
        return pieces

    def _call(self, piece: ToolCallDelta) -> Json:
        """Return the start of a tool call, or more of its arguments."""
        if piece.name is None:
            return {"function": {"arguments": piece.arguments}}
        function = {"name": piece.name, "arguments": piece.arguments}
        return {"id": self._new_call_id(), "type": "function", "function": function}

    def _finish_reason(self, completion: CompletionOutput) -> str | None:
        is_call = completion.finish_reason == "stop" and completion.index in self._callers
        return "tool_calls" if is_call else completion.finish_reason

    def _logprobs(self, parts: Iterable[CompletionOutput]) -> Json | None:
        if self._top_logprobs is None:
            return None
        return {"content": list_logprobs(parts, self._top_logprobs), "refusal": None}


def list_logprobs(parts: Iterable[CompletionOutput], num_top: int) -> list[Json]:
    """Return the log probability of each token, with those of the `num_top` likeliest tokens."""
    return [
        _token_logprobs(token, top, num_top)
        for part in parts
        for token, top in zip(part.token_ids, part.logprobs or (), strict=True)
    ]


def _token_logprobs(token_id: int, top: TokenLogprobs, num_top: int) -> Json:
    ranked = sorted(top.values(), key=lambda entry: entry.rank)[:num_top]
    return {
        **_token(top[token_id].decoded_token, top[token_id].logprob),
        "top_logprobs": [_token(entry.decoded_token, entry.logprob) for entry in ranked],
    }


def _token(text: str, logprob: float) -> Json:
    """Return a token's entry; for part of a character, the bytes are unknown."""
    is_partial = "\N{REPLACEMENT CHARACTER}" in text
    return {"token": text, "logprob": finite(logprob), "bytes": None if is_partial else list(text.encode())}
