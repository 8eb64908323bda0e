"""Voxtral's features compared with transformers' own class, and its tokenizer as published: only tekken.json."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.utils import is_mistral_common_available

from mmlora import LLM, SamplingParams
from mmlora.config import EngineArgs
from mmlora.errors import ConfigError
from mmlora.models.loader import load_tokenizer
from mmlora.processors.families.voxtral import VoxtralProcessor
from mmlora.processors.media.audio import AudioItem
from tests.checkpoints import AUDIO_ID
from tests.families.audio import AUDIO_FAMILIES, VOXTRAL_FRAMES
from tests.families.table import save_family
from tests.media import clip

SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AUDIO]", "[BEGIN_AUDIO]")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("voxtral") / "model", "voxtral")


def as_published(path: Path, **changes: Any) -> None:
    """Remove the files that published checkpoints lack: tokenizer.json and processor_config.json."""
    for file in [*path.glob("token*"), path / "processor_config.json", path / "chat_template.jinja"]:
        file.unlink()
    vocab = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello"]
    content = {
        "config": {
            "pattern": r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+",
            "default_vocab_size": len(vocab) + 20,
            "default_num_special_tokens": 20,
        },
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(vocab)],
        "special_tokens": [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(SPECIAL)],
    }
    (path / "tekken.json").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("num_positions, num_clips, longest", [(VOXTRAL_FRAMES // 2, 50, 40_000), (1500, 3, 1_000_000)])
def test_random_clips_equal_transformers(checkpoint: Path, num_positions: int, num_clips: int, longest: int) -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    config.audio_config.max_source_positions = num_positions
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    processor = VoxtralProcessor(config, checkpoint, tokenizer)
    reference = AUDIO_FAMILIES["voxtral"].processor(tokenizer)
    options = {"sampling_rate": 16_000, "padding": True, "truncation": False, "return_tensors": "pt"}
    options |= {"pad_to_multiple_of": 320 * num_positions, "max_source_positions": 2 * num_positions}
    rng = np.random.default_rng(0)
    for index in range(num_clips):
        samples = rng.normal(0, 0.1 + 0.01 * index, rng.integers(1, longest)).clip(-1, 1).astype(np.float32)
        found = processor.process(AudioItem.from_samples(samples.copy(), 16_000))
        expected = reference._retrieve_input_features([samples], **options)
        assert torch.equal(found.tensors["input_features"], expected)
        assert found.num_embeds == len(expected) * num_positions // 4
        assert found.token_ids == (AUDIO_ID,) * found.num_embeds


def test_published_sizes_give_375_embeddings_in_30_seconds(checkpoint: Path) -> None:
    config, published = transformers.AutoConfig.from_pretrained(checkpoint), transformers.VoxtralConfig()
    config.audio_config = published.audio_config
    processor = VoxtralProcessor(config, checkpoint, transformers.AutoTokenizer.from_pretrained(checkpoint))
    for seconds, num_chunks in ((0.5, 1), (30.0, 1), (30.1, 2)):
        found = processor.process(AudioItem.from_samples(*clip(seconds, 1)))
        assert found.num_embeds == 375 * num_chunks
        assert found.tensors["input_features"].shape == (num_chunks, 80, 3000)


def test_a_published_checkpoint_runs(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "voxtral")
    as_published(path)
    llm = LLM(str(path), device="cpu", dtype="float32", max_model_len=128)
    inputs = {"prompt": "<s>[INST][BEGIN_AUDIO][AUDIO]hello[/INST]", "multi_modal_data": {"audio": clip(0.5, 1)}}
    (output,) = llm.generate(inputs, SamplingParams(max_tokens=4), use_tqdm=False)
    assert output.error is None
    hello = len(SPECIAL) + 13 + 256 + 3
    assert output.prompt_token_ids == [1, 3, 6, *[5] * 8, hello, 4]


@pytest.mark.skipif(is_mistral_common_available(), reason="mistral-common reads old files")
def test_an_old_tokenizer_needs_mistral_common(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "voxtral")
    as_published(path, special_tokens=None)
    with pytest.raises(ConfigError, match=r"(?s)tokenizer=.*mistral.common"):
        load_tokenizer(EngineArgs(model=str(path)), path)


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "voxtral")
    as_published(path)
    (path / "tekken.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer="):
        load_tokenizer(EngineArgs(model=str(path)), path)


def test_a_checkpoint_without_feature_extractor_is_refused(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "voxtral")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (path / name).unlink(missing_ok=True)
    config, tokenizer = transformers.AutoConfig.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)
    with pytest.raises(ConfigError, match="no feature_extractor that can be loaded here"):
        VoxtralProcessor(config, path, tokenizer)
