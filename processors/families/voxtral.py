"""`VoxtralProcessor`: audio features; transformers' class accepts audio only with templates of mistral-common.

Source: https://arxiv.org/abs/2507.13264.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from mmlora.processors.general import GeneralProcessor
from mmlora.processors.media.items import MediaItem


class VoxtralProcessor(GeneralProcessor):
    """Pads clips to whole chunks of the tower (30 s), each with the same number of placeholders.

    Args:
        config: of the model.
        model_path: its directory, with `preprocessor_config.json`.
        tokenizer: must have the placeholder token.

    Raises:
        ConfigError: there is no feature extractor, or the tokenizer does not fit the model.
    """

    def __init__(self, config: PretrainedConfig, model_path: str | Path, tokenizer: Any) -> None:
        super().__init__(config, model_path, tokenizer)
        audio = config.audio_config
        self._num_frames = 2 * audio.max_source_positions  # of a chunk; the tower's convolutions halve them
        # The projector concatenates as many positions as fit into the tower's `intermediate_size`.
        self._num_embeds = audio.max_source_positions * audio.hidden_size // audio.intermediate_size

    def prompt_token_id(self, modality: str, tokenizer: Any) -> int:
        """See `GeneralProcessor.prompt_token_id`; transformers' class fixes the id of the published models."""
        return self._embed_ids[modality]

    def compute_inputs(self, item: MediaItem, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `GeneralProcessor.compute_inputs`; `input_features` are `[num_chunks, num_mel_bins, num_frames]`."""
        arguments, extractor = self._media_arguments(item), self._processor.feature_extractor
        features = extractor(
            arguments["audio"],
            sampling_rate=arguments["sampling_rate"],
            padding=True,
            truncation=False,
            pad_to_multiple_of=self._num_frames * extractor.hop_length,
            return_tensors="pt",
        ).input_features  # [1, num_mel_bins, num_chunks * num_frames]
        chunks = features[0].unflatten(1, (-1, self._num_frames)).transpose(0, 1)
        token_ids = torch.full((1, len(chunks) * self._num_embeds), self.placeholder_token_id("audio"))
        return {"input_ids": token_ids, "input_features": chunks}
