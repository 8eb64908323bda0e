"""`ChatAnswer`: OpenAI's chat completion, whole or in chunks."""

from collections.abc import Iterable

from mmlora.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from mmlora.server.answers import ChoicesAnswer, Json, finite
from mmlora.server.prompt_logprobs import listed_logprobs


class ChatAnswer(ChoicesAnswer):
    """One chat completion in the making.

    Args:
        request_id: the answer's id.
        model: what the client asked for.
        top_logprobs: alternatives to report at each token; None for no log probabilities.
        prompt_logprobs: the same for the prompt's tokens, for whole answers only.
        front: text before each choice.
        include_usage: a stream ends with the token counts.
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
        front: str = "",
        include_usage: bool,
    ) -> None:
        super().__init__(request_id, model, include_usage=include_usage)
        self._top_logprobs = top_logprobs
        self._prompt_logprobs = prompt_logprobs
        self._front = front

    def complete(self, outputs: list[RequestOutput]) -> Json:
        """The whole answer from all deltas, with the log probabilities of the prompt if they were asked for."""
        answer = super().complete(outputs)
        if self._prompt_logprobs is None:
            return answer
        last = outputs[-1]
        listed = listed_logprobs(last.prompt_token_ids, last.prompt_logprobs or (), self._prompt_logprobs)
        return {**answer, "prompt_logprobs": listed}

    def _choice(self, last: RequestOutput, parts: list[CompletionOutput]) -> Json:
        text = self._front + "".join(part.text for part in parts)
        return {
            "index": parts[-1].index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(parts),
            "finish_reason": parts[-1].finish_reason,
            "stop_reason": parts[-1].stop_reason,
        }

    def _opening(self, output: RequestOutput) -> Json:
        return {"delta": {"role": "assistant", "content": self._front}}

    def _news(self, output: RequestOutput, completion: CompletionOutput) -> Json | None:
        logprobs = self._logprobs([completion])
        if completion.text or (logprobs and logprobs["content"]):
            return {"delta": {"content": completion.text}, "logprobs": logprobs}
        return None

    def _closing(self, completion: CompletionOutput) -> Json:
        return {"delta": {}, "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}

    def _logprobs(self, parts: Iterable[CompletionOutput]) -> Json | None:
        if self._top_logprobs is None:
            return None
        return {"content": list_logprobs(parts, self._top_logprobs), "refusal": None}


def list_logprobs(parts: Iterable[CompletionOutput], num_top: int) -> list[Json]:
    """The log probability of each token, with those of the `num_top` likeliest ones."""
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
    """A token's entry; the bytes of one that is only part of a character are not known from its text."""
    is_partial = "\N{REPLACEMENT CHARACTER}" in text
    return {"token": text, "logprob": finite(logprob), "bytes": None if is_partial else list(text.encode())}
