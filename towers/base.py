"""What the engine needs of a model's towers and connectors."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from mmlora.processors.base import ProcessedMedia


@dataclass(frozen=True)
class BidirectionalSpan:
    """Tokens `[start, end)` of a prompt that all see each other; they are computed in one step.

    `ignores_window` says that they do so beyond a sliding window.
    """

    start: int
    end: int
    ignores_window: bool = False


@dataclass(frozen=True)
class PromptLayout:
    """Where the tokens of a prompt stand for the decoder, and which see more than those before them.

    Attributes:
        positions: `[num_rows][num_tokens]`, rotary positions; None where they count up from 0.
        shift: from where a generated token stands to its rotary position.
        bidirectional_spans: spans that do not overlap, by start.
    """

    positions: tuple[tuple[int, ...], ...] | None = None
    shift: int = 0
    bidirectional_spans: tuple[BidirectionalSpan, ...] = ()


class Towers(Protocol):
    """A multimodal model's way from processed media to embeddings of the language model."""

    modalities: frozenset[str]
    num_position_rows: int  # 1, or 3: time, height and width

    def part_of(self, module_name: str) -> str:
        """The part that a module belongs to: `language_model`, `connector`, `vision_tower` or `audio_tower`."""
        ...

    def mode(self, modality: str, modalities: Iterable[str]) -> str:
        """How a modality is encoded beside the others of its prompt; media of different modes share no embeddings."""
        ...

    def layout(self, token_ids: Sequence[int], media: Sequence[tuple[int, ProcessedMedia]]) -> PromptLayout:
        """Lay out a prompt, placeholders expanded, whose media begin at the given tokens; called from any thread."""
        ...

    def encode(self, modality: str, mode: str, items: Sequence[ProcessedMedia]) -> list[torch.Tensor]:
        """Run tower and connector on items whose tensors have equal shapes.

        Returns:
            Per item `[num_embeds, hidden_size]` in the model's dtype; with features for deeper layers
            `[num_embeds, (1 + num_deep) * hidden_size]`.
        """
        ...

    def decoder_inputs(self, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the model takes for tokens: `inputs_embeds [1, num_tokens, hidden_size]`, and all else by token.

        Args:
            token_ids: `[num_tokens]`; those of placeholders may lie outside the vocabulary.
        """
        ...

    def deepstack(self, mask: torch.Tensor, features: torch.Tensor) -> AbstractContextManager[None]:
        """Feed the columns beyond `hidden_size` to the decoder's layers in the forward inside the block.

        Args:
            mask: `[num_tokens]` bool, the tokens of the batch that take them.
            features: `[num_masked, num_deep * hidden_size]`.
        """
        ...
