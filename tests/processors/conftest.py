"""Generated audio and images for the processor tests, and tiny Phi-4-multimodal configurations."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
from PIL import Image
from transformers import Phi4MultimodalConfig

_AUDIO, _IMAGE = 91, 92


def _tone(num_samples: int = 8000, rate: int = 16000, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(num_samples) / rate)).astype(np.float32)


@pytest.fixture
def tone() -> Callable[..., np.ndarray]:
    """A sine of amplitude 0.5."""
    return _tone


@pytest.fixture
def encode_audio() -> Callable[..., bytes]:
    """Encode samples as WAV, FLAC, OGG or MP3 bytes."""

    def encode(samples: np.ndarray | None = None, rate: int = 16000, format: str = "WAV", subtype=None) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, _tone() if samples is None else samples, rate, format=format, subtype=subtype)
        return file.getvalue()

    return encode


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """A smooth image with some noise, from a seed."""

    def draw(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR), dtype=np.int64)
        return Image.fromarray(np.clip(smooth + rng.integers(-20, 20, smooth.shape), 0, 255).astype(np.uint8))

    return draw


@pytest.fixture
def encode_image() -> Callable[..., bytes]:
    """Encode a PIL image as bytes."""

    def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, format=format, **options)
        return file.getvalue()

    return encode


class _Tokenizer:
    names = added_tokens_decoder = {_AUDIO: "<|audio|>", _IMAGE: "<|image|>"}

    def decode(self, token_ids, **_):
        return "".join(self.names[token_id] for token_id in token_ids)

    def convert_ids_to_tokens(self, token_id):
        return self.names.get(token_id)

    def convert_tokens_to_ids(self, token):
        return {text: token_id for token_id, text in self.names.items()}[token]


def _make_config(crop_size=112, patch_size=14, time_reduction=4, **vision):
    return Phi4MultimodalConfig(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        vision_config={
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": crop_size, "crop_size": crop_size, "patch_size": patch_size, "image_token_id": _IMAGE,
            **vision,
        },
        audio_config={
            "hidden_size": 8, "intermediate_size": 8, "num_blocks": 2, "num_attention_heads": 2,
            "nemo_conv_channels": 4,
            "ext_pw_out_channel": 8, "depthwise_separable_out_channel": 8, "time_reduction": time_reduction,
            "audio_token_id": _AUDIO,
        },
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Phi4MultimodalConfig]:
    """Tiny Phi-4-multimodal configurations; placeholder ids 91 (audio) and 92 (image)."""
    return _make_config


@pytest.fixture(scope="session")
def tokenizer() -> _Tokenizer:
    """A tokenizer with only the two placeholder tokens."""
    return _Tokenizer()
