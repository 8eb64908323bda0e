"""Bundled sample images."""

from functools import cached_property
from pathlib import Path

from PIL import Image

_FOLDER = Path(__file__).parent / "samples"


class ImageAsset:
    """A bundled picture of a few shapes.

    Args:
        name: One of `ImageAsset.names()`.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, name: str) -> None:
        if name not in self.names():
            raise ValueError(f"unknown image asset {name!r}; known: {', '.join(self.names())}")
        self.name = name

    @staticmethod
    def names() -> list[str]:
        """Return the names of all bundled pictures."""
        return sorted(path.stem for path in _FOLDER.glob("*.png"))

    @property
    def path(self) -> Path:
        """The PNG file of the picture."""
        return _FOLDER / f"{self.name}.png"

    @cached_property
    def pil_image(self) -> Image.Image:
        """The picture in RGB."""
        with Image.open(self.path) as image:
            return image.convert("RGB")
