"""Towers of Phi-4-multimodal: SigLIP crops and a conformer, each with its own two-layer projection.

Its classes predate `get_image_features` and `get_audio_features`: the embedding modules are called on ids of
placeholders only. Speech has two projections; the second is for prompts that also contain an image.
Source: https://huggingface.co/microsoft/Phi-4-multimodal-instruct
"""

from collections.abc import Mapping, Sequence

import torch

from mmlora.processors.base import ProcessedMedia
from mmlora.towers.general import GeneralTowers

MODULE_PARTS = {
    ".img_processor.": "vision_tower",
    ".audio_embed.encoder.": "audio_tower",
    ".embed_tokens_extend.": "connector",
}


class Phi4MultimodalTowers(GeneralTowers):
    """Encode images and audio with a `Phi4MultimodalForCausalLM`."""

    modalities = frozenset({"audio", "image"})
    joint_modes: Mapping[str, str] = {"audio": "vision"}  # the projection for audio in a prompt with an image

    def part_of(self, module_name: str) -> str:
        """See `Towers.part_of`."""
        return next((part for name, part in MODULE_PARTS.items() if name in f"{module_name}."), "language_model")

    def encode(self, modality: str, mode: str, items: Sequence[ProcessedMedia]) -> list[torch.Tensor]:
        """See `Towers.encode`."""
        if modality == "image" and len(items) > 1:
            # The class attends causally unless a mask hides a patch, so pictures of one batch would change each other.
            return [rows for item in items for rows in self.encode(modality, mode, [item])]
        ids = torch.tensor([[token for item in items for token in item.token_ids or ()]], device=self.model.device)
        blank = self.model.get_input_embeddings().weight.new_zeros(*ids.shape, self.model.config.hidden_size)
        extend = self.model.model.embed_tokens_extend
        if modality == "image":
            embeds = extend.image_embed(ids, blank, **self.batch_tensors(items))
        else:
            projection = "vision" if mode == "vision" else "speech"
            embeds = extend.audio_embed(ids, blank, audio_projection_mode=projection, **self.batch_tensors(items))
        return list(embeds[0].split([item.num_tokens for item in items]))
