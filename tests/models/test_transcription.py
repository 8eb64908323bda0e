"""Transcription prompts: of a family, or from a checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmlora import LLM
from mmlora.errors import ConfigError
from mmlora.models.families import FAMILIES
from mmlora.models.transcription import LANGUAGES, PHI4_MULTIMODAL, TranscriptionPrompt, read_checkpoint_prompt


def test_every_family_with_audio_has_prompts() -> None:
    for family in FAMILIES.values():
        prompt = family.transcription
        assert ("audio" in family.modalities) == (prompt is not None), family.name
        if prompt is not None:
            assert bool(prompt.transcribe) != bool(prompt.chat_template), family.name
            assert set(prompt.languages) <= set(LANGUAGES), family.name
            assert "{language}" in (prompt.transcribe_in or "{language}"), family.name
            assert "{to_language}" in (prompt.translate or "{to_language}"), family.name
            assert prompt.special_token is None or prompt.special_token in (prompt.chat_template or ""), family.name


def test_a_checkpoint_may_have_prompts() -> None:
    assert read_checkpoint_prompt({"transcribe": "write it down"}) == TranscriptionPrompt("write it down")
    content = {"transcribe": "a", "transcribe_in": "b {language}", "translate": "c", "languages": ["en"]}
    expected = TranscriptionPrompt("a", "b {language}", "c", ("en",), takes_context=False)
    assert read_checkpoint_prompt({**content, "takes_context": False}) == expected


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("transcribe it", "an object"),
        ({"translate": "x"}, "'transcribe'"),
        ({"transcribe": None}, "transcribe=None"),
        ({"transcribe": "x", "translate": 3}, "translate=3"),
        ({"transcribe": "x", "languages": "en"}, "languages='en'"),
        ({"transcribe": "x", "languages": ["english"]}, r"languages=\['english'\]"),
        ({"transcribe": "x", "takes_context": "no"}, "takes_context='no'"),
        ({"transcribe": "x", "chat_template": "y"}, "unknown field 'chat_template'; allowed are transcribe"),
    ],
)
def test_invalid_prompts_are_refused(content: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_checkpoint_prompt(content)


def test_a_checkpoint_overrides_its_family(tiny_phi4: Path, tmp_path: Path) -> None:
    assert LLM(str(tiny_phi4), device="cpu").llm_engine.transcription_prompt == PHI4_MULTIMODAL
    path = shutil.copytree(tiny_phi4, tmp_path / "model")
    file = path / "generation_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "transcription_prompt": {"transcribe": "write it down"}}))
    own = LLM(str(path), device="cpu", generation_config="none").llm_engine
    assert own.transcription_prompt == TranscriptionPrompt("write it down") and own.sampling_defaults == {}
    file.write_text(json.dumps({**content, "transcription_prompt": {"transcribe": 1}}))
    with pytest.raises(ConfigError, match="transcribe=1"):
        LLM(str(path), device="cpu")
