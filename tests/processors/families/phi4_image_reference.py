"""Compare `phi4_images.process_image` with transformers' own image class; run as a script, prints JSON.

Usage: phi4_image_reference.py NUM_IMAGES. Prints one object per image: its size and settings, and the differences.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

REAL_TORCHVISION = importlib.util.find_spec("torchvision") is not None
if not REAL_TORCHVISION:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torchvision_stub

    torchvision_stub.install()

from transformers.models.phi4_multimodal.image_processing_phi4_multimodal import (  # noqa: E402
    Phi4MultimodalImageProcessor,
)

from mmlora.errors import MediaError  # noqa: E402
from mmlora.processors.families.phi4_images import ImageSettings, process_image  # noqa: E402

# (crop_size, patch_size, longest side drawn in px); 98 and 126 give an odd number of patches.
KINDS = [(112, 14, 1500), (448, 14, 1500), (112, 16, 700), (98, 14, 700), (126, 14, 900)]
EXTREME = [
    (1, 1),
    (1, 1500),
    (1500, 1),
    (3, 9),
    (1500, 40),
    (1499, 1500),
    (112, 112),
    (448, 448),
    (448, 449),
    (2000, 9),
]


def draw(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    coarse = rng.integers(0, 256, (rng.integers(1, 9), rng.integers(1, 9), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), dtype=np.int64)
    noisy = smooth + rng.integers(-60, 60, smooth.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def compare(index: int) -> dict[str, object]:
    rng = np.random.default_rng(index)
    crop_size, patch_size, longest = KINDS[index % len(KINDS)]
    if index % 5 == index // 5 % 5:
        width, height = EXTREME[index // 5 % len(EXTREME)]
    else:
        uniform = [int(side) for side in rng.uniform(1, longest, 2)]
        logarithmic = [int(np.exp(side)) for side in rng.uniform(0, np.log(longest), 2)]
        width, height = logarithmic if index % 3 == 0 else uniform
    dynamic_hd = int(rng.choice([1, 4, 7, 12, 36])) if crop_size < 448 else int(rng.choice([1, 4, 9]))
    result: dict[str, object] = {"case": f"{width}x{height} crop {crop_size}/{patch_size} hd {dynamic_hd}"}
    image = draw(rng, width, height)
    reference = Phi4MultimodalImageProcessor(
        size={"height": crop_size, "width": crop_size}, patch_size=patch_size, dynamic_hd=dynamic_hd
    )
    try:
        expected = reference(images=image, return_tensors="pt")
    except ValueError as error:
        expected, result["reference_error"] = None, str(error)
    try:
        tensors, num_tokens = process_image(image, ImageSettings(crop_size, patch_size, dynamic_hd))
    except MediaError as error:
        tensors, result["error"] = {}, str(error)
    if expected is None or not tensors:
        return result
    shapes = [list(tensors["image_pixel_values"].shape), list(expected["image_pixel_values"][0].shape)]
    same_shape = shapes[0] == shapes[1]
    difference = (tensors["image_pixel_values"] - expected["image_pixel_values"][0]).abs() if same_shape else None
    return result | {
        "shapes": shapes,
        "max_difference": None if difference is None else difference.max().item(),
        "same_mask": tensors["image_attention_mask"].tolist() == expected["image_attention_mask"][0].bool().tolist(),
        "same_sizes": tensors["image_sizes"].tolist() == expected["image_sizes"][0].tolist(),
        # the reference counts 256 + 16 + 1 tokens for the global view of any crop size; true of 448 px and patch 14
        "tokens": [num_tokens, int(expected["num_img_tokens"][0])] if (crop_size, patch_size) == (448, 14) else None,
    }


if __name__ == "__main__":
    cases = [compare(index) for index in range(int(sys.argv[1]))]
    json.dump({"real_torchvision": REAL_TORCHVISION, "cases": cases}, sys.stdout)
