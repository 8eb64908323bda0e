"""What a model's processor offers to the engine, and what it returns for one media item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mmlora.processors.media.items import MediaItem


@dataclass(frozen=True, eq=False)
class ProcessedMedia:
    """Hold what the tower needs for one item.

    Attributes:
        modality: `"audio"` or `"image"`.
        content_hash: sha256 hex over content and effective processor options; equal hash means equal tensors.
        tensors: this item alone and unpadded, under the names of the model's forward.
        num_tokens: of the prompt that stand for it.
        token_ids: these tokens; None where all of them are the placeholder.
        places: which of them take an embedding; None for all.
        text_before, text_after: that the model's processor writes around them; it belongs to the prompt's own text.
    """

    modality: str
    content_hash: str
    tensors: dict[str, torch.Tensor]
    num_tokens: int
    token_ids: tuple[int, ...] | None = None
    places: tuple[int, ...] | None = None
    text_before: str = ""
    text_after: str = ""

    @property
    def num_embeds(self) -> int:
        """Embeddings that its tower gives."""
        return self.num_tokens if self.places is None else len(self.places)


class MultiModalProcessor(Protocol):
    """Turn media items into tensors for one model; thread-safe, called from a pool."""

    @property
    def modalities(self) -> frozenset[str]:
        """Modalities that the model takes."""
        ...

    def placeholder_token(self, modality: str) -> str:
        """Text that stands for one item of `modality` in a prompt."""
        ...

    def placeholder_token_id(self, modality: str) -> int:
        """Token id of `placeholder_token(modality)`."""
        ...

    def arrange(self, token_ids: Sequence[int], media: Sequence[ProcessedMedia]) -> list[int]:
        """Order a prompt's tokens as the model's own processor does, before its media are put in."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a part of a prompt, special tokens included."""
        ...

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of a part of a prompt, special tokens included."""
        ...

    def normalize(self, prompt: str) -> str:
        """Write the placeholders of a prompt as `placeholder_token` does, where the model knows other spellings.

        Raises:
            MediaError: another spelling stands for an item out of turn.
        """
        ...

    def process(self, item: MediaItem, options: Mapping[str, Any] | None = None) -> ProcessedMedia:
        """Compute the tensors of one item; `options` are the `mm_processor_kwargs` of the request.

        Raises:
            RequestError: an unknown option or a value that is not allowed.
            MediaError: the item cannot be used with this model.
        """
        ...
