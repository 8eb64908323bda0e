"""`PixtralProcessor`: images for Pixtral's tower; transformers' own class cannot be imported without torchvision.

Source: https://huggingface.co/mistralai/Mistral-Small-3.1-24B-Instruct-2503.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmlora.errors import ConfigError
from mmlora.processors.pretrained import load_part


class PixtralProcessor:
    """Replacement of `transformers.PixtralProcessor` with the interface that `GeneralProcessor` uses.

    Args:
        config: of the model.
        path: directory with the settings of transformers' image processor, which needs only Pillow.
        tokenizer: must have `[IMG_BREAK]` and `[IMG_END]`.

    Raises:
        ConfigError: it does not have them, or the settings cannot be read.
    """

    def __init__(self, config: Any, path: Path, tokenizer: Any) -> None:
        self.image_processor = load_part("image_processor", path)
        self._patch_size = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        self._image_id = config.image_token_id
        self._break_id, self._end_id = tokenizer.convert_tokens_to_ids(["[IMG_BREAK]", "[IMG_END]"])
        if {None, tokenizer.unk_token_id} & {self._break_id, self._end_id}:
            raise ConfigError("the tokenizer lacks [IMG_BREAK] or [IMG_END], which end the rows of an image")

    def __call__(self, text: str, images: Sequence[Image.Image], **options: Any) -> dict[str, Any]:
        """Return the tensors of one image, and `input_ids [1, num_tokens]`: rows of patches with end tokens."""
        options.pop("add_special_tokens")
        output = self.image_processor(images, **{"patch_size": self._patch_size, **options})
        height, width = (int(size) // self._patch_size for size in output["image_sizes"][0])
        row = [*[self._image_id] * width, self._break_id]
        return {"input_ids": torch.tensor([[*(row * height)[:-1], self._end_id]]), **output}
