"""Interface between a model's processor and the engine: `MultiModalProcessor` and its result, `ProcessedMedia`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mmlora.processors.media.items import MediaItem


@dataclass(frozen=True, eq=False)
class ProcessedMedia:
    """Input of the tower for one item, and the tokens of the item in the prompt.

    Attributes:
        modality: of the item.
        content_hash: sha256 hex over content and effective processor options; equal hashes mean equal tensors.
        tensors: of this item alone, unpadded, under the argument names of the model's forward.
        num_tokens: of the item in the prompt.
        token_ids: these tokens; None if all of them are the placeholder.
        embed_positions: indices of the tokens that an embedding replaces; None for all.
        text_before, text_after: text that the model's processor writes around the item; part of the prompt's text.
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


class MultiModalProcessor(Protocol):
    """Converts media items to tensors for one model; thread-safe, called from a pool."""

    @property
    def modalities(self) -> frozenset[str]:
        """Modalities that the model takes."""
        ...

    def placeholder_token(self, modality: str) -> str:
        """Return the placeholder of one item in the text of a prompt."""
        ...

    def placeholder_token_id(self, modality: str) -> int:
        """Return the token id of `placeholder_token(modality)`."""
        ...

    def arrange_tokens(self, token_ids: Sequence[int], media: Sequence[ProcessedMedia]) -> list[int]:
        """Order the tokens of a prompt as the model's own processor does, before placeholders are expanded."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a part of a prompt; special tokens in the text are recognized."""
        ...

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of a part of a prompt, special tokens included."""
        ...

    def normalize_placeholders(self, prompt: str) -> str:
        """Replace other spellings of placeholders that the model knows by `placeholder_token`.

        Raises:
            MediaError: a numbered placeholder is out of order.
        """
        ...

    def process(self, item: MediaItem, options: Mapping[str, Any] | None = None) -> ProcessedMedia:
        """Compute the tensors of one item; `options` are the `mm_processor_kwargs` of the request.

        Raises:
            RequestError: an unknown option or a value that is not allowed.
            MediaError: the item cannot be used with this model.
        """
        ...
