"""Granite Speech's features compared with an independent computation in numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from mmlora.errors import MediaError, RequestError
from mmlora.processors.families.granite_speech import GraniteSpeechProcessor
from mmlora.processors.media.audio import AudioItem
from tests.families.table import save_family
from tests.processors.families import granite_features


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> GraniteSpeechProcessor:
    path = save_family(tmp_path_factory.mktemp("granite") / "model", "granite_speech")
    return GraniteSpeechProcessor(AutoConfig.from_pretrained(path), path, AutoTokenizer.from_pretrained(path))


def test_fifty_clips_equal_the_definition(processor: GraniteSpeechProcessor) -> None:
    rng = np.random.default_rng(0)
    for index in range(50):
        samples = (rng.normal(0, 0.1 + 0.01 * index, rng.integers(400, 40_000))).clip(-1, 1).astype(np.float32)
        found = processor.process(AudioItem.from_samples(samples.copy(), 16_000))
        expected = granite_features.features(samples)
        torch.testing.assert_close(found.tensors["input_features"], expected, atol=1e-5, rtol=0)
        assert found.num_tokens == granite_features.num_embeds(len(samples))


def test_silence_and_clips_that_are_too_short(processor: GraniteSpeechProcessor) -> None:
    silence = processor.process(AudioItem.from_samples(np.zeros(8000, np.float32), 16_000))
    assert torch.isfinite(silence.tensors["input_features"]).all()
    with pytest.raises(MediaError, match="shorter than one window"):
        processor.process(AudioItem.from_samples(np.zeros(300, np.float32), 16_000))
    with pytest.raises(RequestError, match="unknown processor option x"):
        processor.process(AudioItem.from_samples(np.zeros(8000, np.float32), 16_000), {"x": 1})


def test_settings_are_read_from_the_model_files(processor: GraniteSpeechProcessor, tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "granite_speech")
    (path / "preprocessor_config.json").write_text('{"melspec_kwargs": {"hop_length": 320}}')
    other = GraniteSpeechProcessor(AutoConfig.from_pretrained(path), path, AutoTokenizer.from_pretrained(path))
    clip = AudioItem.from_samples(np.ones(16_000, np.float32), 16_000)
    assert processor.process(clip).tensors["input_features"].shape == (1, 50, 160)
    assert other.process(clip).tensors["input_features"].shape == (1, 25, 160)
