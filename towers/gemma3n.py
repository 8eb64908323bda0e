"""Towers of Gemma 3n: the decoder takes per-layer inputs, and a clip fills a fixed number of tokens.

Source: https://ai.google.dev/gemma/docs/gemma-3n
"""

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from mmlora.towers.general import GeneralTowers


class Gemma3nTowers(GeneralTowers):
    """Encode pictures on the general path; embed the tokens of the media vocabularies with the connectors."""

    has_token_inputs = True

    def features(self, modality: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `GeneralTowers.features`; tokens beyond the end of a clip take the embedding of padding."""
        if modality != "audio":
            return super().features(modality, tensors)
        is_frame = tensors["input_features_mask"].bool()
        output = self.encoder_output(modality, {**tensors, "input_features_mask": ~is_frame})
        rows, is_padding = output.pooler_output, output.audio_mel_mask
        missing = self.model.config.audio_soft_tokens_per_image - rows.shape[1]
        last_id = torch.tensor([[self.model.model.vocab_size - 1]], device=rows.device)
        rows, is_padding = pad(rows, (0, 0, 0, missing)), pad(is_padding, (0, missing), value=True)
        embeds: torch.Tensor = torch.where(is_padding[..., None], self.model.model.embed_audio(input_ids=last_id), rows)
        return embeds.flatten(0, 1)

    def decoder_inputs(self, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Towers.decoder_inputs`."""
        inner, embeds = self.model.model, super().decoder_inputs(token_ids)["inputs_embeds"]
        for embedder in (inner.embed_vision, inner.embed_audio):
            start, end = embedder.vocab_offset, embedder.vocab_offset + embedder.vocab_size
            is_inside = (token_ids >= start) & (token_ids < end)
            media_embeds = embedder(input_ids=torch.where(is_inside, token_ids, start)[None])
            embeds = torch.where(is_inside[None, :, None], media_embeds, embeds)
        per_layer = inner.language_model.get_per_layer_inputs(token_ids[None])
        return {"inputs_embeds": embeds, "per_layer_inputs": per_layer}
