"""`CompletionAnswer`: OpenAI's legacy completion, to one prompt or several, whole or in chunks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmlora.engine.detokenizer import Detokenizer
from mmlora.outputs import CompletionOutput, RequestOutput
from mmlora.server.openai.completions.logprobs import join_logprobs, legacy_logprobs, next_offset, prompt_offsets
from mmlora.server.openai.completions.protocol import CompletionRequest
from mmlora.server.openai.logprobs import listed_logprobs
from mmlora.server.openai.output import ChoicesAnswer, Json


@dataclass(frozen=True)
class _Front:
    """What stands in front of each answer to a prompt."""

    text: str = ""
    logprobs: Json | None = None
    prompt_logprobs: list[Any] | None = None


class CompletionAnswer(ChoicesAnswer):
    """One completion in the making.

    Attributes:
        request_ids: what the engine must call the prompts, in their order.

    Args:
        request_id: the answer's id.
        model: what the client asked for.
        asked: the request.
        tokenizer: of the model.
    """

    WHOLE = CHUNK = "text_completion"

    def __init__(self, request_id: str, model: str, asked: CompletionRequest, tokenizer: Any) -> None:
        super().__init__(request_id, model, include_usage=asked.include_usage)
        self._asked = asked
        self._prompts = asked.prompts
        self._tokenizer = tokenizer
        self.request_ids = [f"{request_id}-{index}" for index in range(len(self._prompts))]
        self._places = {name: index for index, name in enumerate(self.request_ids)}
        self._fronts: dict[str, _Front] = {}
        self._spelled: dict[int, Detokenizer] = {}  # by choice: its text so far, nothing held back or cut off

    def begin(self, output: RequestOutput) -> None:
        """Make ready what stands in front of the answers to a prompt; for long prompts this takes a while."""
        listed = None
        if self._asked.prompt_logprobs is not None:
            known = output.prompt_logprobs or ()
            listed = listed_logprobs(output.prompt_token_ids, known, self._asked.prompt_logprobs)
        if not self._asked.echo:
            self._fronts[output.request_id] = _Front(prompt_logprobs=listed)
            return
        prompt, token_ids = self._prompts[self._places[output.request_id]], output.prompt_token_ids
        text = prompt if isinstance(prompt, str) else self._spell(prompt)
        logprobs = None
        if self._asked.logprobs is not None:
            offsets = prompt_offsets(self._tokenizer, token_ids, text)
            known = output.prompt_logprobs or ()
            logprobs = legacy_logprobs(token_ids, known, offsets, self._asked.logprobs, self._tokenizer)
        self._fronts[output.request_id] = _Front(text, logprobs, listed)

    def _index(self, output: RequestOutput, place: int) -> int:
        return self._places[output.request_id] * len(output.outputs) + place

    def _choice(self, last: RequestOutput, parts: list[CompletionOutput]) -> Json:
        front = self._front(last)
        text = "" if self._asked.is_prompt_only else "".join(part.text for part in parts)
        choice: Json = {
            "index": self._index(last, parts[-1].index),
            "logprobs": join_logprobs(front.logprobs, self._logprobs(last, parts)),
            **self._closing(parts[-1]),
            "text": front.text + text,
        }
        if self._asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = front.prompt_logprobs
        return choice

    def _opening(self, output: RequestOutput) -> Json:
        front = self._front(output)
        return {"text": front.text, "logprobs": front.logprobs}

    def _news(self, output: RequestOutput, completion: CompletionOutput) -> Json | None:
        logprobs = self._logprobs(output, [completion])
        if self._asked.is_prompt_only or not (completion.text or (logprobs and logprobs["tokens"])):
            return None
        return {"text": completion.text, "logprobs": logprobs}

    def _closing(self, completion: CompletionOutput) -> Json:
        if self._asked.is_prompt_only:
            return {"text": "", "finish_reason": "length", "stop_reason": None}
        return {"text": "", "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}

    def _count(self, output: RequestOutput, new: Iterable[CompletionOutput]) -> None:
        super()._count(output, () if self._asked.is_prompt_only else new)

    def _front(self, output: RequestOutput) -> _Front:
        return self._fronts.get(output.request_id, _Front())

    def _logprobs(self, output: RequestOutput, parts: Sequence[CompletionOutput]) -> Json | None:
        if self._asked.logprobs is None or self._asked.is_prompt_only:
            return None
        token_ids = [token_id for part in parts for token_id in part.token_ids]
        logprobs = [top for part in parts for top in part.logprobs or ()]
        offsets = self._offsets(output, self._index(output, parts[-1].index), token_ids)
        return legacy_logprobs(token_ids, logprobs, offsets, self._asked.logprobs, self._tokenizer)

    def _offsets(self, output: RequestOutput, index: int, token_ids: list[int]) -> list[int]:
        """Where in the choice's text its next tokens begin."""
        if index not in self._spelled:
            is_skipped = self._asked.skip_special_tokens is not False
            prompt_ids = output.prompt_token_ids
            self._spelled[index] = Detokenizer(self._tokenizer, prompt_ids, skip_special_tokens=is_skipped)
        spelled, start, offsets = self._spelled[index], len(self._front(output).text), []
        for token_id in token_ids:
            offsets.append(start + next_offset(spelled, token_id))
        return offsets

    def _spell(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
