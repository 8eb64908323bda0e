"""What the engine needs of a model's towers and connectors."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from mmlora.processors.base import ProcessedMedia


class Towers(Protocol):
    """A multimodal model's way from processed media to embeddings of the language model."""

    modalities: frozenset[str]

    def part_of(self, module_name: str) -> str:
        """The part that a module belongs to: `language_model`, `connector`, `vision_tower` or `audio_tower`."""
        ...

    def mode(self, modality: str, modalities: Iterable[str]) -> str:
        """How a modality is encoded beside the others of its prompt; media of different modes share no embeddings."""
        ...

    def encode(self, modality: str, mode: str, items: Sequence[ProcessedMedia]) -> list[torch.Tensor]:
        """Run tower and connector on items whose tensors have equal shapes.

        Returns:
            Per item `[num_tokens, hidden_size]` in the model's dtype.
        """
        ...
