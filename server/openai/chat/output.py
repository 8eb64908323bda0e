"""`ChatCompletionBuilder`: chat completions, whole or in chunks."""

from collections.abc import Iterable
from typing import ClassVar

from mmlora.outputs import CompletionOutput, RequestOutput
from mmlora.server.openai.chat.protocol import ChatCompletionRequest
from mmlora.server.openai.logprobs import list_logprobs, list_prompt_logprobs
from mmlora.server.openai.output import ChoicesBuilder, Json
from mmlora.server.openai.tools.choice import ToolCalling
from mmlora.server.openai.tools.parser import Piece, TextParser, ToolCallDelta, join_calls


class ChatCompletionBuilder(ChoicesBuilder):
    """Builds one chat completion.

    Args:
        request_id, model: see `ChoicesBuilder`.
        request: the request.
        tool_calling: how the model calls tools.
        prefix: text to repeat at the start of each choice.
    """

    WHOLE = "chat.completion"
    CHUNK = "chat.completion.chunk"
    EMPTY_DELTA: ClassVar[Json] = {"delta": {}}

    def __init__(
        self,
        request_id: str,
        model: str,
        request: ChatCompletionRequest,
        tool_calling: ToolCalling,
        *,
        prefix: str,
    ) -> None:
        super().__init__(request_id, model, request)
        self._request = request
        self._tool_calling = tool_calling
        self._prefix = prefix
        self._parsers: dict[int, TextParser | None] = {}  # by choice
        self._callers: dict[int, bool] = {}  # choices with tool calls, and whether the last one is complete

    def complete(self, outputs: list[RequestOutput]) -> Json:
        """Return the whole completion, with the log probabilities and the ids of the prompt's tokens if requested."""
        last, num_top, listed = outputs[-1], self._request.prompt_logprobs, None
        if num_top is not None:
            listed = list_prompt_logprobs(last.prompt_token_ids, last.prompt_logprobs or (), num_top)
        return {**super().complete(outputs), "prompt_logprobs": listed, **self._prompt_token_ids(last)}

    def _choice(self, last: RequestOutput, parts: list[CompletionOutput]) -> Json:
        pieces = self._pieces(parts[-1].index, "".join(part.text for part in parts), is_last=True)
        content = self._prefix + "".join(piece for piece in pieces if isinstance(piece, str))
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        calls = [self._call(call) for call in join_calls(pieces)]
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

    def _first_fields(self, output: RequestOutput) -> Json:
        return self._prompt_token_ids(output)

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
            choice = self._request.tooling
            skips = self._request.skip_special_tokens is not False
            new_parser = self._tool_calling.new_parser
            self._parsers[index] = new_parser(choice, skips_special_tokens=skips) if choice is not None else None
        parser = self._parsers[index]
        if parser is None:
            return [text] if text else []
        pieces = [*parser.feed(text), *(parser.finish() if is_last else ())]
        for piece in pieces:
            if isinstance(piece, ToolCallDelta):
                self._callers[index] = piece.is_last
        return pieces

    def _call(self, piece: ToolCallDelta) -> Json:
        """Return the start of a tool call, or more of its arguments."""
        if piece.name is None:
            return {"function": {"arguments": piece.arguments}}
        function = {"name": piece.name, "arguments": piece.arguments}
        return {"id": self._tool_calling.new_call_id(), "type": "function", "function": function}

    def _finish_reason(self, completion: CompletionOutput) -> str | None:
        # Without a stop string or stop token, a constraint or the end of the text ended the output.
        is_complete = self._callers.get(completion.index) is True or completion.stop_reason is None
        is_call = completion.finish_reason == "stop" and completion.index in self._callers and is_complete
        return "tool_calls" if is_call else completion.finish_reason

    def _logprobs(self, parts: Iterable[CompletionOutput]) -> Json | None:
        if self._request.num_logprobs is None:
            return None
        return {"content": list_logprobs(parts, self._request.num_logprobs), "refusal": None}
