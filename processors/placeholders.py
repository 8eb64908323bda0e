"""Placeholders of media items in prompts: their tokens, and their expansion to one token for each embedding."""

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
    """Base class of all processors: the placeholder token of each modality.

    Args:
        token_ids: of the placeholders, by modality.
        tokenizer: must have these tokens.

    Raises:
        ConfigError: it does not have them.
    """

    def __init__(self, token_ids: Mapping[str, int], tokenizer: Any) -> None:
        self.modalities = frozenset(token_ids)
        self._tokenizer = tokenizer
        self._token_ids = dict(token_ids)
        self._tokens = {modality: placeholder_text(tokenizer, modality, i) for modality, i in token_ids.items()}

    def placeholder_token(self, modality: str) -> str:
        """Return the placeholder of one item in the text of a prompt."""
        return self._tokens[self._checked(modality)]

    def placeholder_token_id(self, modality: str) -> int:
        """Return the token id of `placeholder_token(modality)`."""
        return self._token_ids[self._checked(modality)]

    def arrange_tokens(self, token_ids: Sequence[int], media: Sequence[ProcessedMedia]) -> list[int]:
        """Return the prompt unchanged."""
        return list(token_ids)

    def tokenize(self, text: str) -> list[int]:
        """See `MultiModalProcessor.tokenize`."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """See `MultiModalProcessor.detokenize`."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def normalize_placeholders(self, prompt: str) -> str:
        """Replace numbered placeholders, `<|image_1|>` and `<|audio_1|>`, by the model's own.

        Raises:
            MediaError: the numbers of a modality are not 1, 2, 3… in this order.
        """
        counts: Counter[str] = Counter()

        def replace_one(match: re.Match[str]) -> str:
            if match[1] not in self.modalities:
                return match[0]
            counts[match[1]] += 1
            if int(match[2]) != counts[match[1]]:
                raise MediaError(
                    f"the prompt has {match[0]!r} where {match[1]} {counts[match[1]]} is expected: items fill their "
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
    """Tokens of one item in an expanded prompt: `token_ids[start : start + length]` of `media[media_index]`."""

    start: int
    length: int
    media_index: int


def placeholder_id(config: PretrainedConfig, modality: str) -> int:
    """Return the token id that embeddings of a modality replace.

    Raises:
        ConfigError: the configuration does not name it.
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
    """Replace each placeholder by the tokens of the next item of its modality.

    Returns:
        The expanded token ids and one range per item, sorted by start.

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
    """Add text around tokens and tokenize them again, since tokens may merge across the boundaries."""
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
