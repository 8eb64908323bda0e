"""`GraniteSpeechProcessor`: log-mel features; transformers' own class needs torchaudio.

Source: `GraniteSpeechFeatureExtractor` and https://huggingface.co/ibm-granite/granite-speech-3.3-2b.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.audio_utils import mel_filter_bank

from mmlora.errors import ConfigError, MediaError, RequestError
from mmlora.processors.base import MultiModalProcessor, ProcessedMedia, placeholder_id
from mmlora.processors.media.audio import RESAMPLER, AudioItem, resample
from mmlora.processors.media.items import MediaItem
from mmlora.processors.pretrained import read_json

MELSPEC = {"sample_rate": 16000, "n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 80}


class GraniteSpeechProcessor(MultiModalProcessor):
    """`MultiModalProcessor` of `GraniteSpeechForConditionalGeneration`.

    Args:
        config: of the model.
        model_path: its directory; settings missing from `preprocessor_config.json` have the defaults of `MELSPEC`.
        tokenizer: must have the placeholder token.

    Raises:
        ConfigError: the files or the tokenizer do not fit the model.
    """

    def __init__(self, config: PretrainedConfig, model_path: str | Path, tokenizer: Any) -> None:
        super().__init__({"audio": placeholder_id(config, "audio")}, tokenizer)
        path = Path(model_path)
        content = read_json(path / "preprocessor_config.json") or read_json(path / "processor_config.json")
        found = content.get("audio_processor", content).get("melspec_kwargs", {})
        self._melspec = {name: int(found.get(name, default)) for name, default in MELSPEC.items()}
        self._window_size, self._downsample_rate = config.window_size, config.downsample_rate
        mel = self._melspec
        if 2 * mel["n_mels"] != config.encoder_config.input_dim:
            raise ConfigError(
                f"the preprocessor has {mel['n_mels']} mel bins, the encoder expects half of "
                f"{config.encoder_config.input_dim}"
            )
        num_bins, rate = mel["n_fft"] // 2 + 1, mel["sample_rate"]
        filters = mel_filter_bank(num_bins, mel["n_mels"], 0.0, rate / 2, rate, norm=None, mel_scale="htk")
        self._filters = torch.from_numpy(filters).float()  # [num_bins, n_mels]

    def process(self, item: MediaItem, options: Mapping[str, Any] | None = None) -> ProcessedMedia:
        """Compute the features of one clip.

        Raises:
            RequestError: there are options; this model has none.
            MediaError: the clip is shorter than one window.
        """
        if options:
            raise RequestError(f"unknown processor option {', '.join(map(str, options))}: this model takes none")
        assert isinstance(item, AudioItem)
        samples = torch.from_numpy(resample(item, self._melspec["sample_rate"]).copy())
        if len(samples) < self._melspec["win_length"]:
            raise MediaError(f"audio of {item.duration_s * 1000:.1f} ms is shorter than one window of 25 ms")
        features = self.features(samples)
        num_blocks = math.ceil(features.shape[1] / self._window_size)
        num_tokens = num_blocks * (self._window_size // self._downsample_rate)
        named = json.dumps({"granite_speech": self._melspec, "resampler": RESAMPLER}, sort_keys=True)
        digest = hashlib.sha256(f"{item.content_hash}\n{named}".encode()).hexdigest()
        return ProcessedMedia("audio", digest, {"input_features": features}, num_tokens)

    def features(self, samples: torch.Tensor) -> torch.Tensor:
        """Return scaled log-mel frames of `samples [num_samples]`, two in one: `[1, num_frames / 2, 2 * n_mels]`."""
        mel = self._melspec
        spectrum = torch.stft(
            samples,
            mel["n_fft"],
            mel["hop_length"],
            mel["win_length"],
            window=torch.hann_window(mel["win_length"]),
            return_complex=True,
        )
        logs = (spectrum.abs().square().T @ self._filters).clamp_min(1e-10).log10()  # [num_frames, n_mels]
        logs = torch.maximum(logs, logs.max() - 8.0) / 4 + 1
        return logs[: len(logs) // 2 * 2].reshape(1, -1, 2 * mel["n_mels"])
