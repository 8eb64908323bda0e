"""Towers of the Qwen2.5-Omni thinker, whose rotary positions depend on audio as well as on images."""

from collections.abc import Sequence

import torch

from mmlora.processors.base import ProcessedMedia
from mmlora.towers.general import GeneralTowers


class Qwen25OmniTowers(GeneralTowers):
    """`GeneralTowers` with other arguments for `get_rope_index`."""

    def rope_arguments(
        self, token_ids: Sequence[int], media: Sequence[tuple[int, ProcessedMedia]]
    ) -> dict[str, torch.Tensor]:
        """See `GeneralTowers.rope_arguments`."""
        arguments = super().rope_arguments(token_ids, media)
        del arguments["mm_token_type_ids"]
        masks = [item.tensors["feature_attention_mask"] for _, item in media if item.modality == "audio"]
        if masks:
            arguments["audio_seqlens"] = torch.cat([mask.sum(-1) for mask in masks])  # clips differ in length
        return {"attention_mask": torch.ones(1, len(token_ids), dtype=torch.long), **arguments}
