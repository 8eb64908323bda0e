"""Interface between a model's processor and the engine: `MultiModalProcessor` and its result, `ProcessedMedia`."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from mmlora.errors import ConfigError, MediaError
from mmlora.processors.media.items import MediaItem
from mmlora.processors.modalities import MODALITIES

_NUMBERED = re.compile(rf"<\|({'|'.join(MODALITIES)})_(\d{{1,9}})\|>", re.ASCII)


@dataclass(frozen=True, eq=False)
class ProcessedMedia:
    """Tower input of one item, and its tokens in the prompt.

    Attributes:
        modality: name of the item's modality.
        content_hash: sha256 hex over content and effective processor options; equal hashes mean equal tensors.
        tensors: of this item alone, unpadded, under the argument names of the model's forward.
        num_tokens: number of tokens of the item in the prompt.
        token_ids: the tokens; None if all of them are the placeholder.
        embed_positions: indices of the tokens that embeddings replace; None for all.
        text_before, text_after: text that the model's processor adds around the item in the prompt.
    """

    modality: str
    content_hash: str
    tensors: dict[str, torch.Tensor]
    num_tokens: int
    token_ids: tuple[int, ...] | None = None
    embed_positions: tuple[int, ...] | None = None
    text_before: str = ""
    text_after: str = ""

    @property
    def num_embeds(self) -> int:
        """Number of embeddings that the tower returns for the item."""
        return self.num_tokens if self.embed_positions is None else len(self.embed_positions)

    @property
    def num_bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class MultiModalProcessor(ABC):
    """Converts media items to tensors for one model; thread-safe, called from a pool.

    Args:
        token_ids: placeholder token ids of the supported modalities.
        tokenizer: must have these tokens.

    Attributes:
        modalities: that the model supports.

    Raises:
        ConfigError: the tokenizer lacks a placeholder token.
    """

    def __init__(self, token_ids: Mapping[str, int], tokenizer: Any) -> None:
        self.modalities = frozenset(token_ids)
        self._tokenizer = tokenizer
        self._token_ids = dict(token_ids)
        self._tokens = {modality: placeholder_text(tokenizer, modality, i) for modality, i in token_ids.items()}

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings from which numbers of placeholders follow, for messages."""
        return {}

    def placeholder_token(self, modality: str) -> str:
        """Return the placeholder of one item in the text of a prompt."""
        return self._tokens[self._checked(modality)]

    def placeholder_token_id(self, modality: str) -> int:
        """Return the token id of `placeholder_token(modality)`."""
        return self._token_ids[self._checked(modality)]

    def arrange_tokens(self, token_ids: Sequence[int], media: Sequence[ProcessedMedia]) -> list[int]:
        """Order the tokens of a prompt as the model's own processor does, before placeholders are expanded."""
        return list(token_ids)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a part of a prompt; special tokens in the text are recognized."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of a part of a prompt, special tokens included."""
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

    @abstractmethod
    def process(self, item: MediaItem, options: Mapping[str, Any] | None = None) -> ProcessedMedia:
        """Compute the tensors and the prompt tokens of one item; `options` are `mm_processor_kwargs` of the request.

        Raises:
            RequestError: an unknown option or a value that is not allowed.
            MediaError: the item cannot be used with this model.
        """

    def _checked(self, modality: str) -> str:
        if modality not in self._token_ids:
            raise MediaError(f"modality {modality!r}: this model supports {', '.join(sorted(self.modalities))}")
        return modality


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
