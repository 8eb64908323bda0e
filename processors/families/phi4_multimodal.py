"""Audio and pictures for Phi-4-multimodal: transformers' own processor class needs torchvision.

Source: https://huggingface.co/microsoft/Phi-4-multimodal-instruct
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmlora.processors.families.phi4_features import (
    load_feature_extractor,
    load_image_settings,
    process_audio,
    with_options,
)
from mmlora.processors.families.phi4_images import process_image


class Phi4MultimodalProcessor:
    """Stand in for `transformers.Phi4MultimodalProcessor`, for the use that `GeneralProcessor` makes of it.

    Args:
        config: the model's `Phi4MultimodalConfig`.
        path: its directory, for `processor_config.json` or `preprocessor_config.json`; without them the settings follow
            from `config`.
        tokenizer: not used.

    Raises:
        ConfigError: the files do not fit the model.
    """

    def __init__(self, config: Any, path: Path, tokenizer: Any) -> None:
        self.image_processor = load_image_settings(config, path)
        self.feature_extractor = load_feature_extractor(config, path)
        self._token_ids = {"audio": config.audio_config.audio_token_id, "image": config.vision_config.image_token_id}

    def __call__(
        self, images: Sequence[Image.Image] = (), audio: Sequence[np.ndarray] = (), **options: Any
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of one clip or picture, and `input_ids [1, num_tokens]`."""
        if images:
            tensors, num_tokens = process_image(images[0], with_options(self.image_processor, options))
        else:
            tensors, num_tokens = process_audio(audio[0], self.feature_extractor)
        token_ids = torch.full((num_tokens,), self._token_ids["image" if images else "audio"])
        return {name: tensor[None] for name, tensor in {"input_ids": token_ids, **tensors}.items()}
