"""Towers of Qwen2-Audio, whose class has no `get_audio_features`.

Source: https://arxiv.org/abs/2407.10759
"""

from collections.abc import Mapping

import torch
from transformers.masking_utils import create_bidirectional_mask

from mmlora.towers.general import GeneralTowers


class Qwen2AudioTowers(GeneralTowers):
    """Encode clips padded to one length, and drop the embeddings of the padding."""

    modalities = frozenset({"audio"})

    def features(self, modality: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `GeneralTowers.features`."""
        inner, frames = self.model.model, tensors["input_features"]
        is_frame = tensors["feature_attention_mask"][:, ::2].bool()  # the convolutions halve the number of frames
        like = frames.new_empty(*is_frame.shape, 1)
        mask = create_bidirectional_mask(config=inner.audio_tower.config, inputs_embeds=like, attention_mask=is_frame)
        hidden_states = inner.audio_tower(frames, attention_mask=mask).last_hidden_state
        rows: torch.Tensor = inner.multi_modal_projector(hidden_states)
        return rows[is_frame[:, 1::2]]  # each row pools two frames; both must be part of the clip
