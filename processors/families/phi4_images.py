"""Dynamic-HD images of Phi-4-multimodal: one global view and a grid of crops, for any crop and patch size.

Source: "Phi-4-Mini Technical Report" (arXiv 2503.01743), section 2.2. An image is scaled to fit a grid of square crops,
padded with white on the right and below, and cut; the global view is the padded image resized to one crop.
The tower pools 2 x 2 patches, so a crop becomes `side²` tokens with `side = ceil(crop_size // patch_size / 2)`. The
model keeps the rows and columns with image content, and adds a separator to each row and one between the views.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, TypedDict

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

from mmlora.errors import MediaError

MIN_SIDE = 10  # px; the model was not trained on thinner images, and its reference code refuses them
WHITE = 255


class ImageOptions(TypedDict, total=False):
    """Processor options that a request may set."""

    dynamic_hd: int


@dataclass(frozen=True)
class ImageSettings:
    """Settings that determine the tensors of an image, together with its pixels.

    Attributes:
        crop_size: side of a crop in px.
        patch_size: side of a vision patch in px.
        dynamic_hd: maximum number of crops of one image, without the global view.
        image_mean, image_std: per channel, of pixels scaled by `rescale_factor`.
        global_mode: interpolation of the global view, `"bicubic"` or `"bilinear"`.
    """

    valid_kwargs: ClassVar[type] = ImageOptions
    crop_size: int
    patch_size: int
    dynamic_hd: int = 36
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    global_mode: str = "bicubic"

    @property
    def patches(self) -> int:
        """Number of patches along one side of a crop."""
        return self.crop_size // self.patch_size

    @property
    def side(self) -> int:
        """Number of tokens along one side of a crop."""
        return -(-self.patches // 2)


def process_image(image: Image.Image, settings: ImageSettings) -> tuple[dict[str, torch.Tensor], int]:
    """Cut an RGB image into crops.

    Returns:
        The tensors `image_pixel_values [1 + crops, 3, crop_size, crop_size] float32` (global view first, then rows of
        crops), `image_attention_mask [1 + crops, patches, patches] bool`, `image_sizes [2] int64` (height and width
        in px of the padded image), and the number of tokens of the image.

    Raises:
        MediaError: the image is too long and thin for this crop size.
    """
    columns, rows = crop_grid(image.width, image.height, settings.crop_size, settings.dynamic_hd)
    width, height = columns * settings.crop_size, rows * settings.crop_size
    filled, kept_width, kept_height = _fit(image, width, height)
    mask = _patch_mask(rows, columns, width - kept_width, height - kept_height, settings)
    pixels = _normalize(filled, settings)  # [3, height, width]
    tensors = {
        "image_pixel_values": torch.cat([_global_view(pixels, settings), _cut(pixels, settings.crop_size)]),
        "image_attention_mask": torch.cat([torch.ones_like(mask[:1]), mask]),
        "image_sizes": torch.tensor([height, width]),
    }
    return tensors, _count_tokens(mask, rows, columns, settings.side, image)


def crop_grid(width: int, height: int, crop_size: int, max_crops: int) -> tuple[int, int]:
    """Return `(columns, rows)`: enough crops for every pixel, or, if that is too many, the closest aspect ratio.

    Among grids of the same ratio, the largest one that the image fills by more than half is chosen.
    """
    columns, rows = math.ceil(width / crop_size), math.ceil(height / crop_size)
    if columns * rows <= max_crops:
        return columns, rows
    best, best_distance = (1, 1), math.inf
    for grid in _grids(max_crops):
        distance = abs(width / height - grid[0] / grid[1])
        fills_half = width * height > 0.5 * crop_size * crop_size * grid[0] * grid[1]
        if distance < best_distance or (distance == best_distance and fills_half):
            best, best_distance = grid, distance
    return best


@lru_cache(maxsize=32)
def _grids(max_crops: int) -> tuple[tuple[int, int], ...]:
    """Return all grids of at most `max_crops` crops, smallest first."""
    grids = [(c, r) for c in range(1, max_crops + 1) for r in range(1, max_crops // c + 1)]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def _fit(image: Image.Image, width: int, height: int) -> tuple[torch.Tensor, int, int]:
    """Scale an image into `width` x `height` and pad it with white; return it, and its width and height unpadded."""
    by_width, by_height = width / image.width, height / image.height
    if by_width < by_height:
        kept = (width, int(image.height * by_width))
    else:
        kept = (int(image.width * by_height), height)
    if min(kept) < MIN_SIDE:
        raise MediaError(
            f"image of {image.width}x{image.height} px is too long and thin: scaled to {kept[0]}x{kept[1]} px, "
            f"each side must keep at least {MIN_SIDE} px"
        )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # [3, height, width] uint8
    if kept != image.size:
        # uint8 in, uint8 out: torchvision uses torch's integer kernel for such a resize, too.
        resized = interpolate(pixels[None], size=(kept[1], kept[0]), mode="bilinear", antialias=True)
        pixels = resized[0]
    return pad(pixels, (0, width - kept[0], 0, height - kept[1]), value=WHITE), *kept


def _patch_mask(rows: int, columns: int, fill_width: int, fill_height: int, settings: ImageSettings) -> torch.Tensor:
    """Return which patches have image content, not only padding: `[rows * columns, patches, patches] bool`."""
    n = settings.patches
    mask = torch.ones(rows * n, columns * n, dtype=torch.bool)
    mask[:, max(columns * n - fill_width // settings.patch_size, 0) :] = False
    mask[max(rows * n - fill_height // settings.patch_size, 0) :] = False
    return mask.view(rows, n, columns, n).transpose(1, 2).reshape(-1, n, n)


def _normalize(pixels: torch.Tensor, settings: ImageSettings) -> torch.Tensor:
    # As in the reference: scaling up mean and deviation rounds once less than scaling down the pixels.
    scale = 1.0 / settings.rescale_factor
    mean = torch.tensor(settings.image_mean) * scale
    std = torch.tensor(settings.image_std) * scale
    return (pixels.float() - mean[:, None, None]) / std[:, None, None]


def _global_view(pixels: torch.Tensor, settings: ImageSettings) -> torch.Tensor:
    """Resize the padded image to one crop, without keeping its ratio: `[1, 3, crop_size, crop_size]`."""
    size = (settings.crop_size, settings.crop_size)
    if tuple(pixels.shape[-2:]) == size:
        return pixels[None]
    return interpolate(pixels[None], size=size, mode=settings.global_mode, align_corners=False)


def _cut(pixels: torch.Tensor, crop_size: int) -> torch.Tensor:
    """Cut `[3, rows * crop_size, columns * crop_size]` to `[rows * columns, 3, crop_size, crop_size]`, row by row."""
    crops = pixels.unfold(1, crop_size, crop_size).unfold(2, crop_size, crop_size)  # [3, rows, columns, c, c]
    return crops.permute(1, 2, 0, 3, 4).reshape(-1, 3, crop_size, crop_size)


def _count_tokens(mask: torch.Tensor, rows: int, columns: int, side: int, image: Image.Image) -> int:
    """Count tokens as the model does: of every second patch of each crop, in the first column and the first row."""
    pooled = mask[:, ::2, ::2].reshape(rows, columns, side, side)
    kept_rows, kept_columns = int(pooled[:, 0, :, 0].sum()), int(pooled[0, :, 0, :].sum())
    if kept_rows == 0 or kept_columns == 0:
        raise MediaError(
            f"image of {image.width}x{image.height} px is too long and thin: no patch would have image content"
        )
    crops, separator, global_view = kept_rows * (kept_columns + 1), 1, side * (side + 1)
    return crops + separator + global_view
