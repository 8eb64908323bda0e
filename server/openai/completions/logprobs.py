"""The `logprobs` of OpenAI's legacy completions: four lists, with one entry for each token."""

from collections.abc import Iterable
from typing import Any

from mmlora.engine.detokenizer import REPLACEMENT, Detokenizer
from mmlora.outputs import TokenLogprobs
from mmlora.server.openai.logprobs import is_reported
from mmlora.server.openai.output import Json, finite

LOGPROB_COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


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
