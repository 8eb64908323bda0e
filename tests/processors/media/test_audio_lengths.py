"""Clips without samples, of one millisecond and of 33 seconds in every audio family: embeddings, or an error."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from mmlora.errors import MediaError
from mmlora.models.families import get_processor
from mmlora.processors.media.audio import AudioItem
from tests.families.audio import AUDIO_FAMILIES
from tests.families.table import save_family

LIMITS_S = {"qwen2_audio": 2, "qwen2_5_omni_thinker": 30}  # of the tiny checkpoints
PADDED = {"qwen3_asr": 7, "voxtral": 8}  # embeddings of a short clip, which transformers pads to 0.5 s or to a chunk


@pytest.mark.parametrize("family", AUDIO_FAMILIES)
def test_clips_without_samples_and_of_one_millisecond(family: str, tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", family)
    processor = get_processor(AutoConfig.from_pretrained(path), path, AutoTokenizer.from_pretrained(path))
    assert processor is not None
    empty, short = (AudioItem.from_samples(np.full(n, 0.1, np.float32), 48_000) for n in (0, 48))
    with pytest.raises(MediaError, match="holds no samples"):
        processor.process(empty)
    if family in PADDED:
        assert processor.process(short).num_embeds == PADDED[family]
        return
    with pytest.raises(MediaError, match="too short|shorter than one window"):
        processor.process(short)


@pytest.mark.parametrize("family", [*AUDIO_FAMILIES, "qwen2_5_omni_thinker"])
def test_the_end_of_a_long_clip_is_never_dropped(family: str, tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", family)
    processor = get_processor(AutoConfig.from_pretrained(path), path, AutoTokenizer.from_pretrained(path))
    assert processor is not None
    item = AudioItem.from_samples(np.random.default_rng(0).uniform(-1, 1, 33 * 8000).astype(np.float32), 8000)
    shorter = AudioItem.from_samples(item.samples[:12000], 8000)
    fewer = processor.process(shorter).num_embeds
    if family in LIMITS_S:
        with pytest.raises(MediaError, match=f"audio is 33.0 s long; this model accepts at most {LIMITS_S[family]} s"):
            processor.process(item)
    else:
        assert processor.process(item).num_embeds > fewer
