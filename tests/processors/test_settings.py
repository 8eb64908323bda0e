"""Settings that a processor's files lack are those of the model's configuration."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

from mmlora.config import EngineArgs
from mmlora.models.config import load_config
from mmlora.models.families import get_processor
from mmlora.models.loader import load_tokenizer
from mmlora.models.media_check import process_blank_media
from mmlora.processors.settings import SETTINGS, find_settings
from tests.families.table import FAMILIES, save_family

FILES = ("processor_config.json", "preprocessor_config.json")


def blank_media(path: Path) -> list[Any]:
    processor = get_processor(load_config(path), path, load_tokenizer(EngineArgs(str(path)), path))
    return process_blank_media(processor, None)


def change_settings(path: Path, file: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    (path / file).write_text(json.dumps(change(json.loads((path / file).read_text()))))


def check_equal(found: list[Any], expected: list[Any]) -> None:
    assert [item.modality for item in found] == [item.modality for item in expected]
    for item, wanted in zip(found, expected, strict=True):
        assert item.token_ids == wanted.token_ids and item.num_embeds == wanted.num_embeds
        assert item.tensors.keys() == wanted.tensors.keys()
        assert all(torch.equal(item.tensors[name], wanted.tensors[name]) for name in wanted.tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_setting_may_be_left_out_or_null(family: str, tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", family)
    (path / "model.safetensors").unlink()
    expected = blank_media(path)
    for file in (file for file in FILES if (path / file).exists()):
        whole = json.loads((path / file).read_text())
        for name in SETTINGS.keys() & whole.keys():
            for change in ({}, {name: None}):
                left = {key: value for key, value in whole.items() if key != name}
                (path / file).write_text(json.dumps({**left, **change}))
                check_equal(blank_media(path), expected)
        named = {"processor_class": whole["processor_class"]} if file == FILES[0] else whole
        (path / file).write_text(json.dumps(named))  # the class alone
    check_equal(blank_media(path), expected)


def test_older_files_without_a_processors_settings(tmp_path: Path) -> None:
    """Before transformers 4.42, a LLaVA had `preprocessor_config.json` alone, which names the processor's class."""
    path = save_family(tmp_path / "model", "llava")
    expected = blank_media(path)
    (path / FILES[0]).unlink()
    check_equal(blank_media(path), expected)
    change_settings(path, FILES[1], lambda settings: {**settings, "processor_class": "LlavaProcessor"})
    check_equal(blank_media(path), expected)


@pytest.mark.parametrize(("vision_class", "expected"), [(CLIPVisionConfig, 1), (SiglipVisionConfig, 0)])
@pytest.mark.parametrize(("image_size", "patch_size"), [(28, 7), (30, 7), (336, 14)])
def test_a_class_token_is_an_additional_token(
    vision_class: Any, expected: int, image_size: int, patch_size: int
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = vision_class(**sizes, image_size=image_size, patch_size=patch_size)
    found = find_settings(
        ["num_additional_image_tokens", "patch_size", "size"], LlavaConfig(vision_config=vision), None
    )
    assert found == {"num_additional_image_tokens": expected, "patch_size": patch_size}
