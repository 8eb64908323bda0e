"""Dynamic-HD crops compared with transformers' own image class, and token counts with the model's own code."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalImageEmbedding

from mmlora.processors.families.phi4_images import ImageSettings, crop_grid, process_image

IMAGE = 92
REFERENCE = Path(__file__).parent / "phi4_image_reference.py"


@pytest.fixture(scope="module")
def comparison():
    run = subprocess.run([sys.executable, str(REFERENCE), "50"], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_fifty_images_equal_transformers_own_class(comparison):
    """Tolerance: 0 where torchvision resizes uint8 natively (AVX2, AVX512), else one of 255 levels (1 / 127.5)."""
    tolerance = 0.0 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 1.01 / 127.5
    compared = [case for case in comparison["cases"] if "shapes" in case]
    assert len(comparison["cases"]) == 50 and len(compared) >= 30
    for case in compared:
        assert case["shapes"][0] == case["shapes"][1], case
        assert case["max_difference"] <= tolerance, case
        assert case["same_mask"] and case["same_sizes"], case
        assert case["tokens"] is None or case["tokens"][0] == case["tokens"][1], case
    assert sum(case["tokens"] is not None for case in compared) >= 5


def test_the_same_images_are_refused_as_too_thin(comparison):
    refused = [case for case in comparison["cases"] if "shapes" not in case]
    assert len(refused) >= 3
    assert all("error" in case and "reference_error" in case for case in refused), refused


def test_the_torchvision_stub_stays_in_its_process(comparison):
    assert comparison["real_torchvision"] == (importlib.util.find_spec("torchvision") is not None)


@pytest.mark.parametrize("size", [(112, 112), (50, 300), (333, 77), (1000, 90), (640, 480), (113, 112)], ids=str)
@pytest.mark.parametrize("crop_size, patch_size", [(112, 14), (98, 14), (126, 14), (112, 16), (100, 14), (64, 8)])
@torch.no_grad()
def test_the_model_returns_the_announced_number_of_embeddings(size, crop_size, patch_size, picture, make_config):
    embed = Phi4MultimodalImageEmbedding(make_config(crop_size, patch_size)).eval()
    tensors, num_tokens = process_image(picture(*size), ImageSettings(crop_size, patch_size, 9))
    ids = torch.full((1, num_tokens), IMAGE)
    batched = {name: tensor[None] for name, tensor in tensors.items()}
    embeddings = embed(ids, torch.zeros(1, num_tokens, 16), **batched)  # raises if the count differs
    assert embeddings.shape == (1, num_tokens, 16) and embeddings.isfinite().all()


def test_crops_are_ordered_row_by_row():
    pixels = np.zeros((224, 336, 3), np.uint8)
    for row in range(2):
        for column in range(3):
            pixels[row * 112 : row * 112 + 112, column * 112 : column * 112 + 112] = 40 * (3 * row + column)
    tensors, num_tokens = process_image(Image.fromarray(pixels), ImageSettings(112, 14))
    levels = (tensors["image_pixel_values"][1:] * 127.5 + 127.5).round()
    assert [crop.unique().tolist() for crop in levels] == [[0.0], [40.0], [80.0], [120.0], [160.0], [200.0]]
    assert tensors["image_sizes"].tolist() == [224, 336] and num_tokens == 8 * 13 + 1 + 20


def test_padding_is_white_and_masked():
    tensors, _ = process_image(Image.new("RGB", (112, 56)), ImageSettings(112, 14))
    crop, mask = tensors["image_pixel_values"][1], tensors["image_attention_mask"][1]
    assert (crop[:, :56] == -1).all() and (crop[:, 56:] == 1).all()
    assert mask[:4].all() and not mask[4:].any() and tensors["image_attention_mask"][0].all()


@pytest.mark.parametrize(
    "size, max_crops, grid",
    [
        ((100, 100), 36, (1, 1)),
        ((225, 100), 36, (3, 1)),
        ((1000, 1000), 36, (6, 6)),
        ((1000, 500), 8, (4, 2)),
        ((230, 230), 8, (2, 2)),
        ((4000, 100), 4, (4, 1)),
    ],
)
def test_the_grid_keeps_the_aspect_ratio_within_the_limit(size, max_crops, grid):
    assert crop_grid(*size, 112, max_crops) == grid
