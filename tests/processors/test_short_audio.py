"""Clips without samples or of one millisecond, for every family that hears: an error that says so, or embeddings."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from mmlora.errors import MediaError
from mmlora.families import get_processor
from mmlora.processors.items import AudioItem
from tests.families.audio import AUDIO_FAMILIES
from tests.families.table import save_family

PADDED = {"qwen3_asr": 7, "voxtral": 8}  # embeddings of whatever is short; transformers pads it to 0.5 s and to a chunk


@pytest.mark.parametrize("family", AUDIO_FAMILIES)
def test_nothing_and_a_millisecond(family: str, tmp_path: Path) -> None:
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
