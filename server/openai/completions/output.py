"""`CompletionBuilder`: legacy completions of one prompt or several, whole or in chunks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mmlora.engine.detokenizer import Detokenizer
from mmlora.errors import RequestError
from mmlora.outputs import CompletionOutput, RequestOutput
from mmlora.server.openai.completions.protocol import CompletionRequest
from mmlora.server.openai.logprobs import (
    join_legacy_logprobs,
    legacy_logprobs,
    list_prompt_logprobs,
    next_offset,
    prompt_offsets,
)
from mmlora.server.openai.output import ChoicesBuilder, Json

MAX_PROMPT_IDS = 500_000  # of one prompt, in all its choices


@dataclass(frozen=True)
class _Prefix:
    """Part of a choice that repeats its prompt."""

    text: str = ""
    logprobs: Json | None = None
    prompt_logprobs: list[Any] | None = None


class CompletionBuilder(ChoicesBuilder):
    """Builds the legacy completion of one request, which may have several prompts.

    Attributes:
        request_ids: ids of the engine's requests, one per prompt.

    Args:
        response_id: id of the response.
        model: model name in the response.
        request: the request.
        tokenizer: of the model.
        request_id: prefix of the ids of the engine's requests; by default the response's id.
    """

    WHOLE = CHUNK = "text_completion"
    EMPTY_DELTA: ClassVar[Json] = {"text": ""}

    def __init__(
        self,
        response_id: str,
        model: str,
        request: CompletionRequest,
        tokenizer: Any,
        *,
        request_id: str | None = None,
    ) -> None:
        super().__init__(response_id, model, request)
        self._request = request
        self._tokenizer = tokenizer
        self.repeats_prompt = bool(request.echo or request.return_token_ids) or request.prompt_logprobs is not None
        self.request_ids = [f"{request_id or response_id}-{index}" for index in range(len(request.prompts))]
        self._prompt_indices = {name: index for index, name in enumerate(self.request_ids)}
        self._prefixes: dict[str, _Prefix] = {}  # by request id
        self._detokenizers: dict[int, Detokenizer] = {}  # by choice; their text still has the stop strings

    def begin(self, output: RequestOutput) -> None:
        """Prepare the part that repeats the prompt; takes a while for long prompts.

        Raises:
            RequestError: the choices would repeat too many token ids.
        """
        num_ids = len(output.prompt_token_ids) * len(output.outputs)
        if self._has_token_ids and num_ids > MAX_PROMPT_IDS:
            message = f"n={len(output.outputs)} choices would repeat {num_ids} token ids of their prompt"
            raise RequestError(f"{message}; the limit is {MAX_PROMPT_IDS}", "n")
        listed = None
        if self._request.prompt_logprobs is not None:
            known = output.prompt_logprobs or ()
            listed = list_prompt_logprobs(output.prompt_token_ids, known, self._request.prompt_logprobs)
        if not self._request.echo:
            self._prefixes[output.request_id] = _Prefix(prompt_logprobs=listed)
            return
        prompt, token_ids = self._request.prompts[self._prompt_indices[output.request_id]], output.prompt_token_ids
        text = prompt if isinstance(prompt, str) else self._decode(prompt)
        logprobs = None
        if self._request.logprobs is not None:
            offsets = prompt_offsets(self._tokenizer, token_ids, text)
            known = output.prompt_logprobs or ()
            logprobs = legacy_logprobs(token_ids, known, offsets, self._request.logprobs, self._tokenizer)
        self._prefixes[output.request_id] = _Prefix(text, logprobs, listed)

    def _index(self, output: RequestOutput, place: int) -> int:
        return self._prompt_indices[output.request_id] * len(output.outputs) + place

    def _choice(self, last: RequestOutput, parts: list[CompletionOutput]) -> Json:
        prefix = self._prefix(last)
        text = "" if self._request.is_prompt_only else "".join(part.text for part in parts)
        return {
            "index": self._index(last, parts[-1].index),
            "logprobs": join_legacy_logprobs(prefix.logprobs, self._logprobs(last, parts)),
            **self._last_delta(parts[-1]),
            "text": prefix.text + text,
            "prompt_logprobs": prefix.prompt_logprobs,
            **self._prompt_token_ids(last),
        }

    def _first_delta(self, output: RequestOutput) -> Json:
        prefix = self._prefix(output)
        return {"text": prefix.text, "logprobs": prefix.logprobs, **self._prompt_token_ids(output)}

    def _delta(self, output: RequestOutput, completion: CompletionOutput) -> Json | None:
        logprobs = self._logprobs(output, [completion])
        if self._request.is_prompt_only or not (completion.text or (logprobs and logprobs["tokens"])):
            return None
        return {"text": completion.text, "logprobs": logprobs}

    def _last_delta(self, completion: CompletionOutput) -> Json:
        if self._request.is_prompt_only:
            return {"text": "", "finish_reason": "length", "stop_reason": None}
        return {"text": "", "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}

    def _count(self, output: RequestOutput, new: Iterable[CompletionOutput]) -> None:
        super()._count(output, () if self._request.is_prompt_only else new)

    def _token_ids(self, parts: Iterable[CompletionOutput]) -> Json:
        return super()._token_ids(() if self._request.is_prompt_only else parts)

    def _prefix(self, output: RequestOutput) -> _Prefix:
        return self._prefixes.get(output.request_id, _Prefix())

    def _logprobs(self, output: RequestOutput, parts: Sequence[CompletionOutput]) -> Json | None:
        if self._request.logprobs is None or self._request.is_prompt_only:
            return None
        token_ids = [token_id for part in parts for token_id in part.token_ids]
        logprobs = [top for part in parts for top in part.logprobs or ()]
        offsets = self._offsets(output, self._index(output, parts[-1].index), token_ids)
        return legacy_logprobs(token_ids, logprobs, offsets, self._request.logprobs, self._tokenizer)

    def _offsets(self, output: RequestOutput, index: int, token_ids: list[int]) -> list[int]:
        """Return the offsets of a choice's next tokens in its text."""
        if index not in self._detokenizers:
            is_skipped = self._request.skip_special_tokens is not False
            prompt_ids = output.prompt_token_ids
            self._detokenizers[index] = Detokenizer(self._tokenizer, prompt_ids, skip_special_tokens=is_skipped)
        detokenizer, start = self._detokenizers[index], len(self._prefix(output).text)
        return [start + next_offset(detokenizer, token_id) for token_id in token_ids]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
