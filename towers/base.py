"""Interface of the engine to a model's towers and connectors, and the layout of a prompt that they define."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from mmlora.processors.base import ProcessedMedia


class EmbeddingCountError(ValueError):
    """A tower has returned more or fewer embeddings than there are placeholders."""


def check_num_embeds(num_embeds: int, num_placeholders: int) -> None:
    """Raise `EmbeddingCountError` if the numbers differ."""
    if num_embeds != num_placeholders:
        raise EmbeddingCountError(f"the tower returned {num_embeds} embeddings for {num_placeholders} placeholders")


@dataclass(frozen=True)
class BidirectionalSpan:
    """Tokens `[start, end)` of a prompt that all attend to each other; a step computes all of them or none.

    Attributes:
        start: the first token.
        end: the token after the last.
        ignores_window: the tokens attend to each other even beyond a sliding window.
    """

    start: int
    end: int
    ignores_window: bool = False


@dataclass(frozen=True)
class PromptLayout:
    """Rotary positions and bidirectional attention of a prompt.

    Attributes:
        positions: `[num_rows][num_tokens]`, rotary positions; None where they count up from 0.
        shift: what to add to the index of a generated token to get its rotary position.
        bidirectional_spans: spans that do not overlap, sorted by start.
    """

    positions: tuple[tuple[int, ...], ...] | None = None
    shift: int = 0
    bidirectional_spans: tuple[BidirectionalSpan, ...] = ()


class Towers(Protocol):
    """Towers and connectors of a multimodal model: from processed media to embeddings of the language model.

    Attributes:
        modalities: supported modalities.
        joint_modes: encoding modes in prompts with several modalities, by modality. In other prompts, and for other
            modalities, the mode is the modality. Embeddings are cached per mode.
        num_position_rows: 1, or 3 for multimodal RoPE: time, height and width.
        has_token_inputs: the decoder takes more per token than its embedding, even without media.
    """

    modalities: frozenset[str]
    joint_modes: Mapping[str, str]
    num_position_rows: int
    has_token_inputs: bool

    def part_of(self, module_name: str) -> str:
        """Return the part of a module: `language_model`, `connector`, `vision_tower` or `audio_tower`."""
        ...

    def layout(self, token_ids: Sequence[int], media: Sequence[tuple[int, ProcessedMedia]]) -> PromptLayout:
        """Return the layout of a prompt. Thread-safe.

        Args:
            token_ids: of the prompt, placeholders expanded.
            media: each item with the index of its first token.
        """
        ...

    def encode(self, modality: str, mode: str, items: Sequence[ProcessedMedia]) -> list[torch.Tensor]:
        """Run tower and connector on items whose tensors have equal shapes.

        Returns:
            Per item `[num_embeds, hidden_size]` in the model's dtype; with deepstack features
            `[num_embeds, (1 + num_deep) * hidden_size]`.
        """
        ...

    def decoder_inputs(self, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the model's inputs for tokens: `inputs_embeds [1, num_tokens, hidden_size]`, and others per token.

        Args:
            token_ids: `[num_tokens]`; ids of placeholders may lie outside the vocabulary.
        """
        ...

    def deepstack(self, mask: torch.Tensor, features: torch.Tensor) -> AbstractContextManager[None]:
        """Add deepstack features to the hidden states of deeper layers during the forward inside the block.

        Args:
            mask: `[num_tokens]` bool, the tokens of the batch that take features.
            features: `[num_masked, num_deep * hidden_size]`, what `encode` returned beyond `hidden_size`.
        """
        ...
