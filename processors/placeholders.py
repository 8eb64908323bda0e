"""Widen the one placeholder token of each media item to the number of embeddings that the item fills."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from mmlora.errors import ConfigError, MediaError
from mmlora.processors.base import MultiModalProcessor, ProcessedMedia
from mmlora.processors.modalities import MODALITIES

_NUMBERED = re.compile(rf"<\|({'|'.join(MODALITIES)})_(\d{{1,9}})\|>", re.ASCII)


class Placeholders:
    """What stands for an item of each modality in a prompt; the part that all processors share.

    Args:
        token_ids: by modality, the token id whose places take its embeddings.
        tokenizer: must know these tokens.

    Raises:
        ConfigError: it does not.
    """

    def __init__(self, token_ids: Mapping[str, int], tokenizer: Any) -> None:
        self.modalities = frozenset(token_ids)
        self._tokenizer = tokenizer
        self._token_ids = dict(token_ids)
        self._tokens = {modality: placeholder_text(tokenizer, modality, i) for modality, i in token_ids.items()}

    def placeholder_token(self, modality: str) -> str:
        """Return the text that stands for one item of `modality`."""
        return self._tokens[self._checked(modality)]

    def placeholder_token_id(self, modality: str) -> int:
        """Return the token id whose places take embeddings of `modality`."""
        return self._token_ids[self._checked(modality)]

    def arrange(self, token_ids: Sequence[int], media: Sequence[ProcessedMedia]) -> list[int]:
        """Leave a prompt as it is."""
        return list(token_ids)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a part of a prompt, special tokens included."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of a part of a prompt, special tokens included."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def normalize(self, prompt: str) -> str:
        """Replace the numbered spelling, `<|image_1|>` and `<|audio_1|>`, by the model's own placeholders.

        Raises:
            MediaError: the numbers of a modality are not 1, 2 and so on, in this order.
        """
        counts: Counter[str] = Counter()

        def replace_one(match: re.Match[str]) -> str:
            if match[1] not in self.modalities:
                return match[0]
            counts[match[1]] += 1
            if int(match[2]) != counts[match[1]]:
                raise MediaError(
                    f"the prompt has {match[0]!r} where {match[1]} {counts[match[1]]} is due: items fill their "
                    "placeholders in order"
                )
            return self.placeholder_token(match[1])

        return _NUMBERED.sub(replace_one, prompt)

    def _checked(self, modality: str) -> str:
        if modality not in self._token_ids:
            raise MediaError(f"modality {modality!r}: this model takes {', '.join(sorted(self.modalities))}")
        return modality


@dataclass(frozen=True)
class PlaceholderRange:
    """Say where one item's embeddings go: `token_ids[start : start + length]`, item `media[media_index]`."""

    start: int
    length: int
    media_index: int


def placeholder_id(config: PretrainedConfig, modality: str) -> int:
    """Return the token id whose places take embeddings of a modality.

    Raises:
        ConfigError: the configuration names none.
    """
    tower = getattr(config, MODALITIES[modality].config_name, None)
    for owner in (config, tower):
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    raise ConfigError(f"{type(config).__name__} names no {modality} placeholder ({modality}_token_id)")


def placeholder_text(tokenizer: Any, modality: str, token_id: int) -> str:
    """Return the text of a placeholder.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    text = tokenizer.convert_ids_to_tokens(token_id)
    if not isinstance(text, str) or tokenizer.convert_tokens_to_ids(text) != token_id:
        raise ConfigError(f"the tokenizer has no token for the {modality} placeholder id {token_id} (got {text!r})")
    return text


def expand_placeholders(
    token_ids: list[int], media: Sequence[ProcessedMedia], processor: MultiModalProcessor
) -> tuple[list[int], list[PlaceholderRange]]:
    """Replace each placeholder by the tokens that stand for the next item of its modality, in order.

    Returns:
        The widened token ids and one range per item, sorted by start.

    Raises:
        MediaError: the prompt has more or fewer placeholders of a modality than there are items.
    """
    waiting = {
        modality: [i for i, m in enumerate(media) if m.modality == modality] for modality in _all(media, processor)
    }
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
    """Put text around some tokens; at the seams it may make other tokens of them."""
    if not before and not after:
        return token_ids
    return processor.tokenize(before + processor.detokenize(token_ids) + after)


def _all(media: Sequence[ProcessedMedia], processor: MultiModalProcessor) -> list[str]:
    return sorted(processor.modalities | {item.modality for item in media})


def _check_counts(token_ids: list[int], waiting: dict[str, list[int]], processor: MultiModalProcessor) -> None:
    for modality, indices in waiting.items():
        if modality not in processor.modalities:
            allowed = ", ".join(sorted(processor.modalities)) or "text only"
            raise MediaError(f"{len(indices)} {modality} item(s) given, but this model takes {allowed}")
        num_placeholders = token_ids.count(processor.placeholder_token_id(modality))
        if num_placeholders != len(indices):
            raise MediaError(
                f"the prompt has {num_placeholders} {modality} placeholder(s) "
                f"{processor.placeholder_token(modality)!r} but {len(indices)} {modality} item(s) were given; "
                "there must be one per item"
            )
