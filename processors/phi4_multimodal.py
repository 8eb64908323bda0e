"""Audio and pictures for Phi-4-multimodal: settings from the model's files, features, placeholder counts, hashes.

Audio features are transformers' own; pictures are `phi4_images.py`, since transformers' class needs torchvision.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from mmlora.errors import MediaError, RequestError
from mmlora.processors.audio import RESAMPLER, resample
from mmlora.processors.base import ProcessedMedia
from mmlora.processors.items import AudioItem, ImageItem, MediaItem
from mmlora.processors.phi4_images import ImageSettings, process_image
from mmlora.processors.phi4_settings import load_feature_extractor, load_image_settings
from mmlora.processors.placeholders import Placeholders

MAX_DYNAMIC_HD = 144  # 12 x 12 crops; at 448 px about 350 MB of float32 for one picture
_OPTIONS = ("dynamic_hd",)
_NUMBERED = re.compile(r"<\|(image|audio)_(\d{1,9})\|>", re.ASCII)


class Phi4MultimodalProcessor(Placeholders):
    """Implement `MultiModalProcessor` for `Phi4MultimodalForCausalLM`.

    Args:
        config: the model's `Phi4MultimodalConfig`.
        model_path: its directory, for `processor_config.json` or `preprocessor_config.json`; without them the
            settings follow from `config`.
        tokenizer: must know the two placeholder tokens.

    Raises:
        ConfigError: the files or the tokenizer do not fit the model.
    """

    def __init__(self, config: PretrainedConfig, model_path: str | Path, tokenizer: Any) -> None:
        self.image_settings: ImageSettings = load_image_settings(config, Path(model_path))
        self.feature_extractor: Any = load_feature_extractor(config, Path(model_path))
        token_ids = {
            "audio": int(config.audio_config.audio_token_id),
            "image": int(config.vision_config.image_token_id),
        }
        super().__init__(token_ids, tokenizer)
        self._audio_settings = {
            **self.feature_extractor.to_dict(),
            "mel_filters": hashlib.sha256(self.feature_extractor.mel_filters.tobytes()).hexdigest(),
            "resampler": RESAMPLER,
        }

    def normalize(self, prompt: str) -> str:
        """Replace `<|image_1|>` and `<|audio_1|>`, as Microsoft's own processor takes them, by the placeholders.

        Raises:
            MediaError: the numbers of a modality are not 1, 2 and so on, in this order.
        """
        counts: Counter[str] = Counter()

        def replace_one(match: re.Match[str]) -> str:
            counts[match[1]] += 1
            if int(match[2]) != counts[match[1]]:
                raise MediaError(
                    f"the prompt has {match[0]!r} where {match[1]} {counts[match[1]]} is due: items fill their "
                    "placeholders in order"
                )
            return self.placeholder_token(match[1])

        return _NUMBERED.sub(replace_one, prompt)

    def process(self, item: MediaItem, options: Mapping[str, Any] | None = None) -> ProcessedMedia:
        """Compute the tensors of one clip or picture.

        Args:
            item: decoded media.
            options: `dynamic_hd`, the most crops of a picture; it has no effect on audio.

        Raises:
            RequestError: unknown option or value not allowed.
            MediaError: a clip shorter than one window, a picture too long and thin.
        """
        settings = self._image_settings_with(options or {})
        if isinstance(item, AudioItem):
            tensors, num_tokens = self._process_audio(item)
            return ProcessedMedia("audio", _hash(item, self._audio_settings), tensors, num_tokens)
        assert isinstance(item, ImageItem)
        tensors, num_tokens = process_image(item.image, settings)
        return ProcessedMedia("image", _hash(item, asdict(settings)), tensors, num_tokens)

    def _process_audio(self, item: AudioItem) -> tuple[dict[str, torch.Tensor], int]:
        extractor = self.feature_extractor
        samples = resample(item, extractor.sampling_rate)
        if len(samples) < extractor.win_length:
            raise MediaError(
                f"audio of {item.duration_s * 1000:.1f} ms ({len(samples)} samples at {extractor.sampling_rate} Hz) is "
                f"too short: at least {extractor.win_length} samples "
                f"({1000 * extractor.win_length / extractor.sampling_rate:g} ms) are needed"
            )
        features = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        # One clip: the extractor gives no mask, and its features do not depend on any other clip's length.
        tensors = {name: features[name][0] for name in ("audio_input_features", "audio_embed_sizes")}
        return tensors, int(tensors["audio_embed_sizes"])

    def _image_settings_with(self, options: Mapping[str, Any]) -> ImageSettings:
        unknown = sorted(str(name) for name in set(options) - set(_OPTIONS))
        if unknown:
            raise RequestError(f"unknown processor option {', '.join(unknown)}: allowed are {', '.join(_OPTIONS)}")
        if "dynamic_hd" not in options:
            return self.image_settings
        value = options["dynamic_hd"]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_DYNAMIC_HD:
            raise RequestError(f"dynamic_hd is {value!r}: it must be a whole number of 1 to {MAX_DYNAMIC_HD} crops")
        return replace(self.image_settings, dynamic_hd=value)


def _hash(item: MediaItem, settings: Mapping[str, Any]) -> str:
    """Hash the content together with every setting that changes its tensors."""
    named = json.dumps({"processor": "phi4_multimodal", item.modality: settings}, sort_keys=True, default=str)
    return hashlib.sha256(f"{item.content_hash}\n{named}".encode()).hexdigest()
