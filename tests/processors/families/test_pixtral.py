"""`PixtralProcessor` compared with `transformers.PixtralProcessor`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from mmlora.errors import ConfigError
from mmlora.models.families import get_processor
from mmlora.processors.media.image import ImageItem
from tests.families.table import FAMILIES, save_family
from tests.media import picture


@pytest.mark.parametrize("family", ["mistral3", "llava+pixtral"])
def test_random_images_equal_transformers(family: str, tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", family)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ours, theirs = get_processor(AutoConfig.from_pretrained(path), path, tokenizer), FAMILIES[family].processor
    assert ours is not None and theirs is not None
    reference, rng, lengths = theirs(tokenizer), np.random.default_rng(0), set()
    for seed in range(50):
        image = picture(*(int(size) for size in rng.integers(9, 130, 2)), seed)
        found = ours.process(ImageItem.from_rgb(image))
        expected = reference(text="[IMG]", images=[image], add_special_tokens=False, return_tensors="pt")
        assert list(found.token_ids or ()) == expected["input_ids"][0].tolist()
        assert torch.equal(found.tensors["pixel_values"], expected["pixel_values"])
        assert torch.equal(found.tensors["image_sizes"], torch.as_tensor(expected["image_sizes"]))
        lengths.add(found.num_tokens)
    assert len(lengths) > 8


def test_a_tokenizer_without_row_ends_is_refused(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "mistral3")
    other = AutoTokenizer.from_pretrained(save_family(tmp_path / "other", "llava"))
    with pytest.raises(ConfigError, match=r"lacks \[IMG_BREAK\] or \[IMG_END\]"):
        get_processor(AutoConfig.from_pretrained(path), path, other)
