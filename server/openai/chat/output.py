"""`ChatCompletionBuilder`: chat completions, whole or in chunks."""

from collections.abc import Iterable
from typing import ClassVar

from mmlora.outputs import CompletionOutput, RequestOutput
from mmlora.server.openai.chat.protocol import ChatCompletionRequest
from mmlora.server.openai.logprobs import list_logprobs, list_prompt_logprobs
from mmlora.server.openai.model_format import OutputFormat
from mmlora.server.openai.output import ChoicesBuilder, Json
from mmlora.server.openai.reasoning import OutputParser
from mmlora.server.openai.tools.parser import Piece, ReasoningDelta, ToolCallDelta, join_calls


class ChatCompletionBuilder(ChoicesBuilder):
    """Builds one chat completion.

    Args:
        request_id, model: see `ChoicesBuilder`.
        request: the request.
        form: form of the outputs.
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
        form: OutputFormat,
        *,
        prefix: str,
    ) -> None:
        super().__init__(request_id, model, request)
        self._request = request
        self._form = form
        self._prefix = prefix
        self._parsers: dict[int, OutputParser] = {}  # by choice
        self._callers: dict[int, bool] = {}  # choices with tool calls, and whether the last one is complete

    def complete(self, outputs: list[RequestOutput]) -> Json:
        """Return the whole completion, with the log probabilities and the ids of the prompt's tokens if requested."""
        last, num_top, listed = outputs[-1], self._request.prompt_logprobs, None
        if num_top is not None:
            listed = list_prompt_logprobs(last.prompt_token_ids, last.prompt_logprobs or (), num_top)
        return {**super().complete(outputs), "prompt_logprobs": listed, **self._prompt_token_ids(last)}

    def _choice(self, last: RequestOutput, parts: list[CompletionOutput]) -> Json:
        pieces = [piece for part in parts for piece in self._pieces(last, part, is_last=part is parts[-1])]
        content = self._prefix + "".join(piece for piece in pieces if isinstance(piece, str))
        reasoning = _reasoning(pieces)
        message: Json = {"role": "assistant", "content": content, "refusal": None, **reasoning}
        calls = [self._call(call) for call in join_calls(pieces)] if parts[-1].index in self._callers else []
        if calls or reasoning:
            message |= {"content": content or None, **({"tool_calls": calls} if calls else {})}
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
        pieces = self._pieces(output, completion, is_last=completion.finish_reason is not None)
        calls = [{"index": piece.index, **self._call(piece)} for piece in pieces if isinstance(piece, ToolCallDelta)]
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        delta = {**_reasoning(pieces), **({"tool_calls": calls} if calls else {})}
        if not (content or delta or (logprobs and logprobs["content"])):
            return None
        return {"delta": {**({"content": content} if content or not delta else {}), **delta}, "logprobs": logprobs}

    def _last_delta(self, completion: CompletionOutput) -> Json:
        return {"delta": {}, "finish_reason": self._finish_reason(completion), "stop_reason": completion.stop_reason}

    def _pieces(self, output: RequestOutput, completion: CompletionOutput, *, is_last: bool) -> list[Piece]:
        """Split the next text of a choice into reasoning, content and tool calls."""
        if self._form.is_plain:
            return [completion.text] if completion.text else []
        index = completion.index
        if index not in self._parsers:
            self._parsers[index] = self._form.new_parser(output.prompt)
        parser = self._parsers[index]
        pieces = parser.feed(completion.text, len(completion.token_ids)) + (parser.finish() if is_last else [])
        for piece in pieces:
            if isinstance(piece, ToolCallDelta):
                self._callers[index] = piece.is_last
        return pieces

    def _usage(self) -> Json:
        if self._form.model.reasoning is None:
            return super()._usage()
        num_tokens = sum(parser.num_reasoning_tokens for parser in self._parsers.values())
        return {**super()._usage(), "completion_tokens_details": {"reasoning_tokens": num_tokens}}

    def _call(self, piece: ToolCallDelta) -> Json:
        """Return the start of a tool call, or more of its arguments."""
        if piece.name is None:
            return {"function": {"arguments": piece.arguments}}
        function = {"name": piece.name, "arguments": piece.arguments}
        return {"id": self._form.new_call_id(), "type": "function", "function": function}

    def _finish_reason(self, completion: CompletionOutput) -> str | None:
        # Without a stop string or stop token, a constraint or the end of the text ended the output.
        is_complete = self._callers.get(completion.index) is True or completion.stop_reason is None
        is_call = completion.finish_reason == "stop" and completion.index in self._callers and is_complete
        return "tool_calls" if is_call else completion.finish_reason

    def _logprobs(self, parts: Iterable[CompletionOutput]) -> Json | None:
        if self._request.num_logprobs is None:
            return None
        return {"content": list_logprobs(parts, self._request.num_logprobs), "refusal": None}


def _reasoning(pieces: Iterable[Piece]) -> Json:
    """Return the reasoning under both names that vLLM has for it."""
    text = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningDelta))
    return {"reasoning": text, "reasoning_content": text} if text else {}
