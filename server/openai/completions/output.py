"""`CompletionBuilder`: OpenAI's legacy completion, to one prompt or several, whole or in chunks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmlora.engine.detokenizer import REPLACEMENT, Detokenizer
from mmlora.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from mmlora.server.openai.completions.protocol import CompletionRequest
from mmlora.server.openai.logprobs import is_reported, listed_logprobs
from mmlora.server.openai.output import ChoicesBuilder, Json, finite

LOGPROB_COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@dataclass(frozen=True)
class _Front:
    """What stands in front of each answer to a prompt."""

    text: str = ""
    logprobs: Json | None = None
    prompt_logprobs: list[Any] | None = None


class CompletionBuilder(ChoicesBuilder):
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
            **self._last_delta(parts[-1]),
            "text": front.text + text,
        }
        if self._asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = front.prompt_logprobs
        return choice

    def _first_delta(self, output: RequestOutput) -> Json:
        front = self._front(output)
        return {"text": front.text, "logprobs": front.logprobs}

    def _delta(self, output: RequestOutput, completion: CompletionOutput) -> Json | None:
        logprobs = self._logprobs(output, [completion])
        if self._asked.is_prompt_only or not (completion.text or (logprobs and logprobs["tokens"])):
            return None
        return {"text": completion.text, "logprobs": logprobs}

    def _last_delta(self, completion: CompletionOutput) -> Json:
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


def legacy_logprobs(
    token_ids: Iterable[int],
    logprobs: Iterable[TokenLogprobs | None],
    offsets: Iterable[int],
    num_top: int,
    tokenizer: Any,
) -> Json:
    """Build the four lists.

    Args:
        token_ids, logprobs, offsets: of equal length; nothing is known of the probability of a prompt's first token.
        num_top: alternatives to report at each token, beside the token itself; -1 for all that are known.
        tokenizer: spells tokens of unknown probability.
    """
    lists: Json = {column: [] for column in LOGPROB_COLUMNS}
    for token_id, top, offset in zip(token_ids, logprobs, offsets, strict=True):
        own = top.get(token_id) if top is not None else None
        lists["tokens"].append(own.decoded_token if own is not None else tokenizer.decode([token_id]))
        lists["token_logprobs"].append(finite(own.logprob) if own is not None else None)
        lists["top_logprobs"].append(_by_text(top, token_id, num_top) if top is not None else None)
        lists["text_offset"].append(offset)
    return lists


def join_logprobs(first: Json | None, second: Json | None) -> Json | None:
    """The lists of a text that is followed by another."""
    if first is None or second is None:
        return first if second is None else second
    return {column: first[column] + second[column] for column in LOGPROB_COLUMNS}


def prompt_offsets(tokenizer: Any, token_ids: Iterable[int], text: str) -> list[int]:
    """Where in the text of a prompt its tokens begin.

    A token that is not in the text, such as one that begins every prompt, or the second of those that stand for a
    picture, begins where the next one does. If the tokens spell another text, as after normalization, their own
    lengths are added up.
    """
    detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=False)
    pieces, matched, position = [], [], 0
    for token_id in token_ids:
        start = len(detokenizer.text)
        detokenizer.append(token_id)
        pieces.append(detokenizer.text[start:])
        matched.append(position)
        position += len(pieces[-1]) if text.startswith(pieces[-1], position) else 0
    if position == len(text):
        return matched
    spelled = [0]
    for piece in pieces:
        spelled.append(spelled[-1] + len(piece))
    return spelled[:-1]


def next_offset(detokenizer: Detokenizer, token_id: int) -> int:
    """Add a token to a text and tell where in it the token begins, or the character that it is a part of."""
    start = len(detokenizer.text)
    detokenizer.append(token_id)
    piece = detokenizer.text[start:]
    whole = piece.lstrip(REPLACEMENT)  # bytes of earlier tokens that turned out to be no character come with it
    return start + len(piece) - len(whole) if whole else start


def _by_text(top: TokenLogprobs, token_id: int, num_top: int) -> dict[str, float]:
    """Alternatives by their text; of several with one text, such as parts of characters, the likeliest."""
    by_text: dict[str, float] = {}
    for i in sorted(top, key=lambda i: top[i].rank):
        if is_reported(top, i, token_id, num_top):
            by_text.setdefault(top[i].decoded_token, finite(top[i].logprob))
    return by_text
