"""Stub of the few torchvision names that transformers' Phi-4-multimodal image class uses.

Install it only in a separate process (`phi4_image_reference.py`). It behaves like torchvision's documentation and
sources say: `v2.functional.resize` of a tensor is `torch.nn.functional.interpolate` with `align_corners=False`, on
uint8 for bilinear on AVX2 or AVX512 processors, otherwise on float32 with a rounded result.
"""

import sys
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import torch


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def resize(image, size, interpolation=InterpolationMode.BILINEAR, max_size=None, antialias=True):
    assert max_size is None and interpolation in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
    if list(image.shape[-2:]) == list(size):
        return image
    native = interpolation is InterpolationMode.BICUBIC or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    cast = image.dtype == torch.uint8 and not native
    source = image.float() if cast else image
    scaled = torch.nn.functional.interpolate(
        source[None], size=list(size), mode=interpolation.value, align_corners=False, antialias=antialias
    )[0]
    return scaled.round().to(image.dtype) if cast else scaled


def pad(image, padding, fill=0, padding_mode="constant"):
    assert padding_mode == "constant"
    left, top, right, bottom = padding
    height, width = image.shape[-2:]
    color = torch.tensor(fill, dtype=image.dtype)[:, None, None]
    framed = color.expand(-1, height + top + bottom, width + left + right).clone()
    framed[:, top : top + height, left : left + width] = image
    return framed


def pil_to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalize(image, mean, std, inplace=False):
    mean, std = (torch.as_tensor(v, dtype=image.dtype).view(-1, 1, 1) for v in (mean, std))
    return image.sub(mean).div(std)


def install() -> None:
    """Install the stub in `sys.modules`; call this before importing transformers."""
    functional = {
        "resize": resize,
        "pad": pad,
        "normalize": normalize,
        "pil_to_tensor": pil_to_tensor,
        "InterpolationMode": InterpolationMode,
    }
    _module("torchvision", __version__="0.28.0", __path__=[])
    _module("torchvision.io", ImageReadMode=None, decode_image=None)  # imported, not called
    _module("torchvision.transforms", InterpolationMode=InterpolationMode, __path__=[])
    _module("torchvision.transforms.functional", pil_to_tensor=pil_to_tensor, InterpolationMode=InterpolationMode)
    _module("torchvision.transforms.v2", __path__=[])
    _module("torchvision.transforms.v2.functional", **functional)


def _module(name: str, **members: object) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package="__path__" in members)
    for key, value in members.items():
        setattr(module, key, value)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
