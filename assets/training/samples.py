"""Make the sample clips and pictures of `assets/samples/`."""

from pathlib import Path

import numpy as np
import soundfile

from mmlora.assets.training import pictures
from mmlora.assets.training.pictures import Scene, Shape
from mmlora.assets.training.speech import RATE, synthesize

FOLDER = Path(__file__).parent.parent / "samples"
CLIPS = {
    "mary_had_lamb": ("mary had a little lamb its fleece was white as snow", "en-us"),
    "two_plus_three": ("what is two plus three", "en-gb"),
    "what_color_is_the_circle": ("what color is the circle", "en-us+f2"),
    "how_many_shapes": ("how many shapes are there", "en-gb-x-rp"),
}
PICTURES = {
    "shapes": (
        Shape("circle", "red", "big", 26, 38, 20),
        Shape("square", "blue", "little", 60, 82, 10),
        Shape("star", "yellow", "big", 88, 34, 19),
    ),
    "triangle": (Shape("triangle", "green", "big", 54, 60, 21),),
}


def main() -> None:
    """Write all samples."""
    FOLDER.mkdir(exist_ok=True)
    for name, (text, voice) in CLIPS.items():
        samples = np.pad(synthesize(text, voice, speed=150), RATE // 10)
        soundfile.write(FOLDER / f"{name}.flac", samples, RATE, subtype="PCM_16")
    for seed, (name, shapes) in enumerate(PICTURES.items(), start=3):
        pictures.draw(Scene(shapes, seed), side=pictures.SIDE).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
