"""Log probabilities in responses: OpenAI's lists for chats and legacy completions, and vLLM's for prompts."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from mmlora.engine.detokenizer import REPLACEMENT, Detokenizer
from mmlora.errors import RequestError
from mmlora.outputs import CompletionOutput, TokenLogprobs
from mmlora.server.openai.output import Json, finite

MAX_PROMPT_LOGPROBS = 500_000  # in one response
LEGACY_COLUMNS: Final = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def check_prompt_logprobs(num_prompt_tokens: int, num_top: int, vocab_size: int, *, n: int = 1) -> None:
    """Refuse a request that would report too many log probabilities of prompt tokens.

    Args:
        num_prompt_tokens: of all prompts together.
        num_top: alternatives per token, in addition to the token itself; -1 for the whole vocabulary.
        vocab_size: of the tokenizer.
        n: number of choices that repeat them.

    Raises:
        RequestError: there would be too many.
    """
    num_entries = num_prompt_tokens * n * (1 + (num_top if num_top >= 0 else vocab_size))
    if num_entries > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"{num_entries} log probabilities of prompt tokens, in n={n} choices each, are too many; "
            f"the limit is {MAX_PROMPT_LOGPROBS}",
            "n" if n > 1 else "prompt_logprobs",
        )


def list_logprobs(parts: Iterable[CompletionOutput], num_top: int) -> list[Json]:
    """Return the log probability of each token, with those of the `num_top` likeliest tokens; -1 for all tokens."""
    return [
        _token_logprobs(token, top, num_top)
        for part in parts
        for token, top in zip(part.token_ids, part.logprobs or (), strict=True)
    ]


def list_prompt_logprobs(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], num_top: int) -> list[Any]:
    """Return vLLM's `prompt_logprobs`: per token a mapping of token ids to their entries, or None if unknown."""
    return [
        None if top is None else {str(i): _entry(top, i) for i in top if _is_reported(top, i, token_id, num_top)}
        for token_id, top in zip(token_ids, logprobs, strict=True)
    ]


def legacy_logprobs(
    token_ids: Iterable[int],
    logprobs: Iterable[TokenLogprobs | None],
    offsets: Iterable[int],
    num_top: int,
    tokenizer: Any,
) -> Json:
    """Return the four lists of a legacy completion, with one entry per token.

    Args:
        token_ids, logprobs, offsets: of equal length; the log probabilities of a prompt's first token are None.
        num_top: alternatives per token, in addition to the token itself; -1 for all that are known.
        tokenizer: decodes tokens without log probabilities.
    """
    lists: Json = {column: [] for column in LEGACY_COLUMNS}
    for token_id, top, offset in zip(token_ids, logprobs, offsets, strict=True):
        own = top.get(token_id) if top is not None else None
        lists["tokens"].append(own.decoded_token if own is not None else tokenizer.decode([token_id]))
        lists["token_logprobs"].append(finite(own.logprob) if own is not None else None)
        lists["top_logprobs"].append(_by_text(top, token_id, num_top) if top is not None else None)
        lists["text_offset"].append(offset)
    return lists


def join_legacy_logprobs(first: Json | None, second: Json | None) -> Json | None:
    """Concatenate the lists of two consecutive texts."""
    if first is None or second is None:
        return first if second is None else second
    return {column: first[column] + second[column] for column in LEGACY_COLUMNS}


def prompt_offsets(tokenizer: Any, token_ids: Iterable[int], text: str) -> list[int]:
    """Return the offset of each token in the text of a prompt.

    A token that adds no text to the prompt (BOS, or the second and later placeholders of an image) gets the offset of
    the next token. If the tokens decode to a different text, for example because the tokenizer normalizes it, offsets
    are cumulative lengths of the decoded tokens.
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
    decoded = [0]
    for piece in pieces:
        decoded.append(decoded[-1] + len(piece))
    return decoded[:-1]


def next_offset(detokenizer: Detokenizer, token_id: int) -> int:
    """Append a token and return the offset of its text, or of the character that it is a part of."""
    start = len(detokenizer.text)
    detokenizer.append(token_id)
    piece = detokenizer.text[start:]
    whole = piece.lstrip(REPLACEMENT)  # bytes of earlier tokens that did not become a character come first
    return start + len(piece) - len(whole) if whole else start


def _by_text(top: TokenLogprobs, token_id: int, num_top: int) -> dict[str, float]:
    """Return log probabilities by text; of tokens with the same text, such as parts of characters, the highest."""
    by_text: dict[str, float] = {}
    for i in sorted(top, key=lambda i: top[i].rank):
        if _is_reported(top, i, token_id, num_top):
            by_text.setdefault(top[i].decoded_token, finite(top[i].logprob))
    return by_text


def _is_reported(top: TokenLogprobs, candidate: int, token_id: int, num_top: int) -> bool:
    """Return whether a candidate is the token itself or one of the `num_top` most likely."""
    return num_top == -1 or candidate == token_id or top[candidate].rank <= num_top


def _entry(top: TokenLogprobs, token_id: int) -> Json:
    found = top[token_id]
    return {"logprob": finite(found.logprob), "rank": found.rank, "decoded_token": found.decoded_token}


def _token_logprobs(token_id: int, top: TokenLogprobs, num_top: int) -> Json:
    ranked = sorted(top.values(), key=lambda entry: entry.rank)[: num_top if num_top >= 0 else None]
    return {
        **_token(top[token_id].decoded_token, top[token_id].logprob),
        "top_logprobs": [_token(entry.decoded_token, entry.logprob) for entry in ranked],
    }


def _token(text: str, logprob: float) -> Json:
    """Return a token's entry; for part of a character, the bytes are unknown."""
    is_partial = REPLACEMENT in text
    return {"token": text, "logprob": finite(logprob), "bytes": None if is_partial else list(text.encode())}
