"""Expansion of the placeholders in a prompt to the tokens of the media items."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmlora.errors import MediaError
from mmlora.processors.base import MultiModalProcessor, ProcessedMedia


@dataclass(frozen=True)
class PlaceholderRange:
    """Tokens of one item in an expanded prompt: `token_ids[start : start + length]` of `media[media_index]`."""

    start: int
    length: int
    media_index: int


def expand_placeholders(
    token_ids: list[int], media: Sequence[ProcessedMedia], processor: MultiModalProcessor
) -> tuple[list[int], list[PlaceholderRange]]:
    """Replace each placeholder by the tokens of the next item of its modality.

    Returns:
        The expanded token ids and one range per item, sorted by start.

    Raises:
        MediaError: the prompt has more or fewer placeholders of a modality than there are items.
    """
    modalities = sorted(processor.modalities | {item.modality for item in media})
    waiting = {modality: [i for i, item in enumerate(media) if item.modality == modality] for modality in modalities}
    modality_of = {processor.placeholder_token_id(modality): modality for modality in sorted(processor.modalities)}
    _check_counts(token_ids, waiting, processor)
    queues = {modality: iter(indices) for modality, indices in waiting.items()}
    expanded: list[int] = []
    ranges: list[PlaceholderRange] = []
    prompt_tokens: list[int] = []  # since the last item
    text_before = ""
    for token_id in token_ids:
        modality = modality_of.get(token_id)
        if modality is None:
            prompt_tokens.append(token_id)
            continue
        media_index = next(queues[modality])
        item = media[media_index]
        expanded += _with_text(text_before, prompt_tokens, item.text_before, processor)
        prompt_tokens, text_before = [], item.text_after
        ranges.append(PlaceholderRange(len(expanded), item.num_tokens, media_index))
        expanded += item.token_ids or [token_id] * item.num_tokens
    return expanded + _with_text(text_before, prompt_tokens, "", processor), ranges


def _with_text(before: str, token_ids: list[int], after: str, processor: MultiModalProcessor) -> list[int]:
    """Add text around tokens and tokenize them again, since tokens may merge across the boundaries."""
    if not before and not after:
        return token_ids
    return processor.tokenize(before + processor.detokenize(token_ids) + after)


def _check_counts(token_ids: list[int], waiting: dict[str, list[int]], processor: MultiModalProcessor) -> None:
    for modality, indices in waiting.items():
        if modality not in processor.modalities:
            allowed = ", ".join(sorted(processor.modalities)) or "text only"
            raise MediaError(f"{len(indices)} {modality} item(s) given, but this model supports {allowed}")
        num_placeholders = token_ids.count(processor.placeholder_token_id(modality))
        if num_placeholders != len(indices):
            raise MediaError(
                f"the prompt has {num_placeholders} {modality} placeholder(s) "
                f"{processor.placeholder_token(modality)!r} but {len(indices)} {modality} item(s) were given; "
                "there must be one per item"
            )
