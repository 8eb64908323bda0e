"""Towers of Phi-4-multimodal: SigLIP crops and a conformer, each with its own two-layer projection.

Its classes predate `get_image_features`/`get_audio_features`: the embedding modules are called on placeholder-only
ids. Speech has two projections; the second serves prompts that also hold an image.
Source: https://huggingface.co/microsoft/Phi-4-multimodal-instruct
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mmlora.processors.base import ProcessedMedia
from mmlora.towers.base import PromptLayout
from mmlora.towers.general import embed_tokens

PREFIX = "model.embed_tokens_extend."
PARTS = {
    "image_embed.img_processor.": "vision_tower",
    "audio_embed.encoder.": "audio_tower",
    "": "connector",
}


class Phi4MultimodalTowers:
    """Encode images and audio with a `Phi4MultimodalForCausalLM`.

    Args:
        model: the loaded model.
    """

    modalities = frozenset({"audio", "image"})
    num_position_rows = 1

    def __init__(self, model: Any) -> None:
        self._model = model
        self._extend = model.model.embed_tokens_extend
        self._image_token_id: int = model.config.vision_config.image_token_id
        self._audio_token_id: int = model.config.audio_config.audio_token_id
        self._embedding: torch.Tensor = model.get_input_embeddings().weight

    def part_of(self, module_name: str) -> str:
        """See `Towers.part_of`."""
        if not module_name.startswith(PREFIX):
            return "language_model"
        name = module_name.removeprefix(PREFIX)
        return next(part for start, part in PARTS.items() if name.startswith(start))

    def mode(self, modality: str, modalities: Iterable[str]) -> str:
        """Return `vision` for audio beside an image, else the projection of the modality itself."""
        if modality == "audio":
            return "vision" if "image" in modalities else "speech"
        return modality

    def layout(self, token_ids: Sequence[int], media: Sequence[tuple[int, ProcessedMedia]]) -> PromptLayout:
        """Return the plain layout: causal, positions from 0."""
        return PromptLayout()

    def decoder_inputs(self, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Towers.decoder_inputs`."""
        return {"inputs_embeds": embed_tokens(self._model, token_ids)}

    def deepstack(self, mask: torch.Tensor, features: torch.Tensor) -> AbstractContextManager[None]:
        """Feed nothing: this model has features of its first layer only."""
        return nullcontext()

    def encode(self, modality: str, mode: str, items: Sequence[ProcessedMedia]) -> list[torch.Tensor]:
        """See `Towers.encode`."""
        if modality == "image" and len(items) > 1:
            # The class attends causally unless some mask hides a patch: pictures encoded together change each other.
            return [rows for item in items for rows in self.encode(modality, mode, [item])]
        num_tokens = [item.num_tokens for item in items]
        tensors = {name: torch.stack([item.tensors[name] for item in items]) for name in items[0].tensors}
        if modality == "image":
            embeds = self._extend.image_embed(*self._blank(self._image_token_id, sum(num_tokens)), **tensors)
        else:
            embeds = self._extend.audio_embed(
                *self._blank(self._audio_token_id, sum(num_tokens)), audio_projection_mode=mode, **tensors
            )
        return list(embeds[0].split(num_tokens))

    def _blank(self, token_id: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Placeholder ids `[1, num_tokens]` and zero embeddings `[1, num_tokens, hidden_size]` to scatter into."""
        like = self._embedding
        ids = torch.full((1, num_tokens), token_id, device=like.device)
        return ids, torch.zeros((1, num_tokens, like.shape[1]), dtype=like.dtype, device=like.device)
