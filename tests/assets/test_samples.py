"""The bundled clips, pictures and assistant can be found and read."""

import numpy as np
import pytest

from mmlora.assets.audio import AudioAsset
from mmlora.assets.image import ImageAsset
from mmlora.assets.models import assistant_adapters, assistant_default_mm_loras, assistant_path


@pytest.mark.parametrize("name", AudioAsset.names())
def test_clip_is_mono_float_speech_of_a_few_seconds(name: str) -> None:
    samples, rate = AudioAsset(name).audio_and_sample_rate
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert 1 < len(samples) / rate < 10
    assert 0.1 < np.abs(samples).max() <= 1


@pytest.mark.parametrize("name", ImageAsset.names())
def test_picture_is_rgb(name: str) -> None:
    image = ImageAsset(name).pil_image
    assert image.mode == "RGB" and image.size == (112, 112)


@pytest.mark.parametrize(("asset", "known"), [(AudioAsset, "mary_had_lamb"), (ImageAsset, "shapes")])
def test_unknown_name_is_an_error_that_lists_the_known_ones(asset: type, known: str) -> None:
    with pytest.raises(ValueError, match=rf"'nothing'.*{known}"):
        asset("nothing")


def test_defaults_name_bundled_adapters() -> None:
    adapters = assistant_adapters()
    assert set(adapters) == {"speech-lora", "vision-lora", "spanish-lora"}
    defaults = assistant_default_mm_loras()
    assert defaults["audio"] == adapters["speech-lora"]
    assert defaults["image"] == defaults["audio+image"] == adapters["vision-lora"]
    assert all(folder.startswith(assistant_path()) for folder in adapters.values())
