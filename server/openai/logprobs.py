"""vLLM's `prompt_logprobs`: the log probabilities of a prompt's tokens in an answer."""

from collections.abc import Sequence
from typing import Any

from mmlora.outputs import TokenLogprobs
from mmlora.server.bodies import FieldError
from mmlora.server.openai.output import Json, finite

MAX_PROMPT_LOGPROBS = 500_000  # in one answer


def listed_logprobs(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], num_top: int) -> list[Any]:
    """For each token of a prompt what `RequestOutput.prompt_logprobs` has."""
    return [
        None if top is None else {str(i): _entry(top, i) for i in top if is_reported(top, i, token_id, num_top)}
        for token_id, top in zip(token_ids, logprobs, strict=True)
    ]


def is_reported(top: TokenLogprobs, candidate: int, token_id: int, num_top: int) -> bool:
    """Whether a candidate is the token itself or one of the `num_top` likeliest."""
    return num_top == -1 or candidate == token_id or top[candidate].rank <= num_top


def check_prompt_logprobs(num_prompt_tokens: int, num_top: int | None, vocab_size: int, *, n: int = 1) -> None:
    """Refuse to tell too many of them.

    Args:
        num_prompt_tokens: of all prompts.
        num_top: how many are wanted at each token beside its own; None for none at all, -1 for `vocab_size`.
        vocab_size: of the tokenizer.
        n: in how many choices they stand.

    Raises:
        FieldError: there would be too many.
    """
    if num_top is None:
        return
    num_entries = num_prompt_tokens * n * (1 + (num_top if num_top >= 0 else vocab_size))
    if num_entries > MAX_PROMPT_LOGPROBS:
        raise FieldError(
            f"{num_entries} log probabilities of prompt tokens, in n={n} choices each, are too many; "
            f"allowed are {MAX_PROMPT_LOGPROBS}",
            "n" if n > 1 else "prompt_logprobs",
        )


def _entry(top: TokenLogprobs, token_id: int) -> Json:
    found = top[token_id]
    return {"logprob": finite(found.logprob), "rank": found.rank, "decoded_token": found.decoded_token}
