"""`Phi4MultimodalProcessor`: audio and images for Phi-4-multimodal; transformers' own class needs torchvision.

Audio features are transformers' own; images are in `phi4_images.py`.
Source: https://huggingface.co/microsoft/Phi-4-multimodal-instruct
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Phi4MultimodalFeatureExtractor, PretrainedConfig

from mmlora.errors import ConfigError, MediaError, RequestError
from mmlora.processors.families.phi4_images import ImageSettings, process_image
from mmlora.processors.pretrained import read_json

_EXTRACTOR_FIELDS = (
    *("feature_size", "sampling_rate", "hop_length", "n_fft", "win_length", "preemphasis", "padding_value"),
    *("audio_compression_rate", "audio_downsample_rate", "audio_feat_stride"),
    *("mel_min_frequency", "mel_max_frequency"),
)
MAX_DYNAMIC_HD = 144  # 12 x 12 crops; at 448 px about 350 MB of float32 for one image
_GLOBAL_MODES = {2: "bilinear", 3: "bicubic"}  # numbers of PIL.Image.Resampling


class Phi4MultimodalProcessor:
    """Replacement of `transformers.Phi4MultimodalProcessor` with the interface that `GeneralProcessor` uses.

    Args:
        config: the model's `Phi4MultimodalConfig`.
        path: its directory, with `processor_config.json` or `preprocessor_config.json`; without them, the settings are
            derived from `config`.
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
        """Return the tensors of one clip or image, and `input_ids [1, num_tokens]`."""
        if images:
            tensors, num_tokens = process_image(images[0], with_options(self.image_processor, options))
        else:
            tensors, num_tokens = process_audio(audio[0], self.feature_extractor)
        token_ids = torch.full((num_tokens,), self._token_ids["image" if images else "audio"])
        return {name: tensor[None] for name, tensor in {"input_ids": token_ids, **tensors}.items()}


def load_feature_extractor(config: PretrainedConfig, model_path: Path) -> Any:
    """Build transformers' feature extractor; settings missing from the files are derived from the configuration.

    Raises:
        ConfigError: its number of embeddings would differ from the audio tower's.
    """
    audio = config.audio_config
    found = _read_settings(model_path, ("audio_processor", "feature_extractor"))
    settings = {"feature_size": audio.input_size, "audio_compression_rate": audio.time_reduction}
    settings.update({name: found[name] for name in _EXTRACTOR_FIELDS if name in found})
    extractor = Phi4MultimodalFeatureExtractor(**settings)
    if extractor.feature_size != audio.input_size:
        raise ConfigError(
            f"feature_size of the preprocessor is {extractor.feature_size}, the audio tower takes {audio.input_size}"
        )
    rate = extractor.audio_compression_rate * extractor.audio_downsample_rate
    if rate != audio.time_reduction or extractor.audio_feat_stride != 1:
        raise ConfigError(
            f"the preprocessor counts one audio embedding per {rate} frames (audio_compression_rate x "
            f"audio_downsample_rate) with audio_feat_stride {extractor.audio_feat_stride}; "
            f"the audio tower has time_reduction {audio.time_reduction} and needs stride 1"
        )
    return extractor


def process_audio(samples: np.ndarray, extractor: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Compute the features of one clip.

    Args:
        samples: `[num_samples] float32` at the extractor's rate.

    Returns:
        `audio_input_features [num_frames, feature_size]` and `audio_embed_sizes []`, and the number of tokens.

    Raises:
        MediaError: the clip is shorter than one window.
    """
    if len(samples) < extractor.win_length:
        rate, window_ms = extractor.sampling_rate, 1000 * extractor.win_length / extractor.sampling_rate
        raise MediaError(
            f"audio of {1000 * len(samples) / rate:.1f} ms ({len(samples)} samples at {rate} Hz) is too short: at "
            f"least {extractor.win_length} samples ({window_ms:g} ms) are needed"
        )
    features = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    # One clip: the extractor gives no mask, and its features do not depend on any other clip's length.
    tensors = {name: features[name][0] for name in ("audio_input_features", "audio_embed_sizes")}
    return tensors, int(tensors["audio_embed_sizes"])


def with_options(settings: ImageSettings, options: Mapping[str, Any]) -> ImageSettings:
    """Return the settings of one image.

    Raises:
        RequestError: `dynamic_hd`, the maximum number of crops, has a value that is not allowed.
    """
    value = options.get("dynamic_hd", settings.dynamic_hd)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_DYNAMIC_HD:
        raise RequestError(f"dynamic_hd is {value!r}: it must be a whole number of 1 to {MAX_DYNAMIC_HD} crops")
    return replace(settings, dynamic_hd=value)


def load_image_settings(config: PretrainedConfig, model_path: Path) -> ImageSettings:
    """Read the image settings; settings missing from the files are derived from the vision configuration.

    Raises:
        ConfigError: crop or patch size differ from the model's, or a setting is not supported.
    """
    vision = config.vision_config
    crop_size, patch_size = vision.crop_size, vision.patch_size
    found = _read_settings(model_path, ("image_processor",))
    size = found.get("size", crop_size)
    pair = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if pair != (crop_size, crop_size):
        raise ConfigError(f"size of the preprocessor is {size}, the vision tower has crop_size {crop_size}")
    if found.get("patch_size", patch_size) != patch_size or not isinstance(patch_size, int):
        raise ConfigError(f"patch_size of the preprocessor is {found.get('patch_size')}, of the tower {patch_size}")
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if found.get(name) is False:
            raise ConfigError(f"{name} is False in the preprocessor's settings: only True is supported")
    if found.get("resample", 3) not in _GLOBAL_MODES:
        raise ConfigError(f"resample is {found['resample']!r}: allowed are 2 (bilinear) and 3 (bicubic)")
    settings = ImageSettings(
        crop_size=crop_size,
        patch_size=patch_size,
        dynamic_hd=found.get("dynamic_hd", ImageSettings.dynamic_hd),
        image_mean=_per_channel(found, "image_mean", ImageSettings.image_mean),
        image_std=_per_channel(found, "image_std", ImageSettings.image_std),
        rescale_factor=float(found.get("rescale_factor", ImageSettings.rescale_factor)),
        global_mode=_GLOBAL_MODES[found.get("resample", 3)],
    )
    _check_pooling(settings, vision.image_size)
    return settings


def _check_pooling(settings: ImageSettings, image_size: Any) -> None:
    """Check that the tower can pool the crops: it pads an odd number of patches only if `image_size` has one, too."""
    if settings.patches < 1:
        raise ConfigError(f"crop_size {settings.crop_size} is smaller than patch_size {settings.patch_size}")
    if settings.patches % 2 == 1 and image_size // settings.patch_size % 2 == 0:
        raise ConfigError(
            f"crop_size {settings.crop_size} gives an odd number of patches ({settings.patches}) but image_size "
            f"{image_size} an even one: the vision tower cannot pool such crops"
        )
    if not isinstance(settings.dynamic_hd, int) or settings.dynamic_hd < 1:
        raise ConfigError(f"dynamic_hd of the preprocessor is {settings.dynamic_hd!r}: it must be 1 or more")


def _per_channel(found: dict[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    value = found.get(name, default)
    values = (value,) * 3 if isinstance(value, int | float) else tuple(float(v) for v in value)
    if len(values) != 3:
        raise ConfigError(f"{name} of the preprocessor is {value}: three numbers are needed")
    return values


def _read_settings(model_path: Path, parts: tuple[str, ...]) -> dict[str, Any]:
    """Return the part of `processor_config.json`, or the flat `preprocessor_config.json`, or an empty dict."""
    if not model_path.is_dir():
        raise ConfigError(f"model_path {str(model_path)!r} is not a directory: give the local folder or Hub snapshot")
    nested = read_json(model_path / "processor_config.json")
    for part in parts:
        if isinstance(nested.get(part), dict):
            return {key: value for key, value in nested[part].items() if value is not None}
    return read_json(model_path / "preprocessor_config.json")
