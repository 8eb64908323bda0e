"""`PaliGemmaProcessor`: prompts of PaliGemma are images, the BOS token, the text and a line break.

Source: https://github.com/google-research/big_vision/blob/main/big_vision/configs/proj/paligemma/README.md
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmlora.processors.base import ProcessedMedia
from mmlora.processors.general import GeneralProcessor
from mmlora.processors.media.items import MediaItem


class PaliGemmaProcessor(GeneralProcessor):
    """`GeneralProcessor` that puts images in front of a prompt without placeholders."""

    def process(self, item: MediaItem, options: Mapping[str, Any] | None = None) -> ProcessedMedia:
        """See `GeneralProcessor.process`; `arrange_tokens` adds the text after the image."""
        found = super().process(item, options)
        return replace(found, num_tokens=found.num_embeds, token_ids=None, embed_positions=None, text_after="")

    def arrange_tokens(self, token_ids: Sequence[int], media: Sequence[ProcessedMedia]) -> list[int]:
        """See `MultiModalProcessor.arrange_tokens`."""
        if not media:
            return list(token_ids)
        image_id, bos_id = self.placeholder_token_id("image"), self._tokenizer.bos_token_id
        prompt = [token for token in token_ids if token != bos_id]
        if image_id not in prompt:
            prompt = [*[image_id] * len(media), *prompt]
        end = len(prompt) - prompt[::-1].index(image_id)
        return [*prompt[:end], bos_id, *self.tokenize(self.detokenize(prompt[end:]) + "\n")]
