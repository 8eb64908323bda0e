"""Clips for Qwen2.5-Omni: its processor pads each to five minutes, 15 MB."""

from collections.abc import Mapping
from typing import Any

from mmlora.processors.general import GeneralProcessor
from mmlora.processors.media.items import MediaItem


class Qwen25OmniProcessor(GeneralProcessor):
    """The general path, without the frames that the model would not look at."""

    def model_inputs(self, item: MediaItem, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `GeneralProcessor.model_inputs`."""
        output = dict(super().model_inputs(item, options))
        if item.modality == "audio":
            num_frames = int(output["feature_attention_mask"].sum())
            for name in ("feature_attention_mask", "input_features"):
                output[name] = output[name][..., :num_frames].clone()
        return output
