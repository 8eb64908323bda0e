"""Prompts of processors that add text around images, compared with `transformers` token by token."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from mmlora.models.families import get_processor
from mmlora.processors.media.image import ImageItem
from mmlora.processors.placeholders import expand_placeholders
from tests.families.table import FAMILIES, save_family
from tests.media import picture

PIECES = ("\n", "\n\n", " ", "a dog", "<|user|>", "<|end|>", "", "é", "<|assistant|>\n")


@pytest.mark.parametrize(
    ("family", "mark", "is_marked"),
    [("gemma3", "<start_of_image>", True), ("paligemma", "<image>", True), ("paligemma", "<image>", False)],
)
def test_random_prompts_equal_transformers(family: str, mark: str, is_marked: bool, tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", family)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ours, theirs = get_processor(AutoConfig.from_pretrained(path), path, tokenizer), FAMILIES[family].processor
    assert ours is not None and theirs is not None
    reference, rng = theirs(AutoTokenizer.from_pretrained(path)), np.random.default_rng(0)
    item = ours.process(ImageItem.from_rgb(picture(30, 40, 0)))
    for _ in range(50):
        num_images = int(rng.integers(1, 4)) if is_marked else 1
        texts = ["".join(rng.choice(PIECES, rng.integers(0, 5))) for _ in range(num_images + 1)]
        prompt = (mark if is_marked else "").join(texts)
        expected = reference(text=[prompt], images=[[picture(30, 40, 0)] * num_images], return_tensors="np")
        token_ids = ours.arrange_tokens(tokenizer(prompt).input_ids, [item] * num_images)
        found, ranges = expand_placeholders(token_ids, [item] * num_images, ours)
        assert found == expected["input_ids"][0].tolist(), repr(prompt)
        assert len(ranges) == num_images
        for place in ranges:
            token_ids = found[place.start : place.start + place.length]
            assert token_ids == list(item.token_ids or [tokenizer.image_token_id] * item.num_tokens)
