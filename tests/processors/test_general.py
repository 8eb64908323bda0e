"""`mm_processor_kwargs` with `GeneralProcessor`: the options of each model's own processor, and their limits."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from mmlora.errors import RequestError
from mmlora.models.families import get_processor
from mmlora.processors.base import MultiModalProcessor, ProcessedMedia
from mmlora.processors.media.image import ImageItem
from tests.families.table import FAMILIES, save_family
from tests.media import picture

OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen2_vl", "<|image_pad|>", {"size": {"shortest_edge": 196 * 9, "longest_edge": 196 * 12}}),
    ("gemma3", "<start_of_image>", {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8}),
    ("internvl", "<IMG_CONTEXT>", {"max_patches": 2}),
    ("idefics3", "<image>", {"do_image_splitting": False}),
    ("mistral3", "[IMG]", {"size": {"longest_edge": 28}}),
]


@pytest.mark.parametrize(("family", "mark", "options"), OPTIONS, ids=[family for family, *_ in OPTIONS])
def test_options_reach_the_models_processor(family: str, mark: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", family)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ours, theirs = get_processor(AutoConfig.from_pretrained(path), path, tokenizer), FAMILIES[family].processor
    assert ours is not None and theirs is not None
    image = picture(90, 30, 1)
    found = ours.process(ImageItem.from_rgb(image), options)
    expected = theirs(tokenizer)(text=mark, images=[image], add_special_tokens=False, return_tensors="pt", **options)
    assert all_tokens(found, ours) == expected["input_ids"][0].tolist()
    assert torch.equal(found.tensors["pixel_values"], expected["pixel_values"])
    plain = ours.process(ImageItem.from_rgb(image))
    assert plain.content_hash != found.content_hash
    assert plain.tensors["pixel_values"].shape != found.tensors["pixel_values"].shape
    with pytest.raises(RequestError, match="unknown processor option banana: allowed are .*do_resize"):
        ours.process(ImageItem.from_rgb(image), {"banana": 1})


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_vl", {"size": {"shortest_edge": 10**6, "longest_edge": 10**6}}),
        ("qwen2_vl", {"max_pixels": 10**9}),
        ("gemma3", {"size": {"height": 4000, "width": 4000}}),
        ("llava", {"size": {"shortest_edge": 4000}}),
        ("llava", {"size": {"shortest_edge": float("nan")}}),
        ("llava_next", {"image_grid_pinpoints": [[4000, 4000]]}),
        ("internvl", {"max_patches": 1000}),
    ],
)
def test_options_cannot_scale_a_small_image_up(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    processor = build(family, tmp_path)
    with pytest.raises(RequestError, match="numbers up to .* are allowed"):
        processor.process(ImageItem.from_rgb(picture(30, 40, 1)), options)


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3", "qwen2_vl", "internvl", "gemma3", "mistral3"])
@pytest.mark.parametrize(
    "options",
    [
        {"size": "x"},
        {"image_std": 0},
        {"image_mean": [1, 2]},
        {"rescale_factor": "a"},
        {"size": None},
        {"resample": 99},
    ],
    ids=str,
)
def test_options_of_wrong_types_raise_request_errors(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Some of these values are accepted by transformers."""
    processor = build(family, tmp_path)
    with suppress(RequestError):
        assert processor.process(ImageItem.from_rgb(picture(30, 40, 1)), options).num_tokens > 0


def build(family: str, folder: Path) -> MultiModalProcessor:
    path = save_family(folder / "model", family)
    processor = get_processor(AutoConfig.from_pretrained(path), path, AutoTokenizer.from_pretrained(path))
    assert processor is not None
    return processor


def all_tokens(item: ProcessedMedia, processor: Any) -> list[int]:
    before, after = processor.tokenize(item.text_before), processor.tokenize(item.text_after)
    return [*before, *(item.token_ids or ()), *after]
