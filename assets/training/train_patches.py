"""Stage 4a: warm up the vision tower by predicting, for every patch, which shape ends there.

An early layer also predicts which pixels lie inside a shape, regardless of its color. The heads are discarded after
stage 4, which still uses the first of them for an auxiliary loss.
"""

import argparse
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer

from mmlora.assets.training import pictures
from mmlora.assets.training.loop import Checkpoint, optimizer_for, set_up, train
from mmlora.assets.training.model import CHECKPOINTS, build_config, build_model, patch_features
from mmlora.assets.training.pictures import PATCH, PATCHES_PER_SIDE, SIDE, Scene
from mmlora.assets.training.world import COLORS, SHAPES, SIZES

NONE_WEIGHT = 0.05
CLASSES = (1 + len(SHAPES), len(COLORS), len(SIZES))
NUM_COUNTS, MAX_COUNT = 1 + len(SHAPES) + len(COLORS), 4
MASK_LAYER = 2
MASK_SIDE = PATCH // 2


def patch_targets(scenes: list[Scene]) -> torch.Tensor:
    """Return `[num_scenes, 64, 3]`: kind (0 is none), color and size of the shape that ends in each patch, or -1."""
    targets = torch.full((len(scenes), PATCHES_PER_SIDE**2, 3), -1)
    targets[..., 0] = 0
    for i, scene in enumerate(scenes):
        for s in scene.shapes:
            target = (1 + SHAPES.index(s.kind), COLORS.index(s.color), SIZES.index(s.size))
            targets[i, s.patch] = torch.tensor(target)
    return targets


def mask_targets(masks: list[Image.Image]) -> torch.Tensor:
    """Return how much of every 2 x 2 px of each patch lies inside a shape, `[num_scenes, 64, 49]` in 0 to 1."""
    side = PATCHES_PER_SIDE * MASK_SIDE
    small = np.stack([np.asarray(mask.resize((side, side), Image.Resampling.BOX)) for mask in masks])
    grid = torch.from_numpy(small).float().view(-1, PATCHES_PER_SIDE, MASK_SIDE, PATCHES_PER_SIDE, MASK_SIDE)
    return grid.transpose(2, 3).flatten(3).flatten(1, 2) / 255


def normalized(images: Sequence[Image.Image]) -> torch.Tensor:
    """Stack 112-px pictures as the image processor does, `[num_images, 3, 112, 112]` in -1 to 1."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def pixels(scenes: list[Scene]) -> torch.Tensor:
    """Draw scenes as normalized pixels `[num_scenes, 3, 112, 112]`."""
    return normalized([pictures.draw(scene) for scene in scenes])


class PatchHeads(nn.Module):
    """Prediction heads of the vision tower: the shape that ends in each patch, its centre, and the number of shapes.

    The last patch, which attends to all others, predicts the total number of shapes, and those of each kind and color.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, sum(CLASSES))
        self.place = nn.Linear(width, 2)
        self.count = nn.Linear(width, NUM_COUNTS * (MAX_COUNT + 1))

    def loss(self, hidden: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
        """Sum the losses of kind (patches without a shape at 5 %), color, size, place and counts.

        Args:
            hidden: Patch features, `[num_scenes, 64, width]`.
            scenes: What the pictures show.
        """
        targets = patch_targets(scenes)
        loss = hidden.new_zeros(())
        for logits, target in zip(self.shape(hidden).split(CLASSES, dim=-1), targets.unbind(-1), strict=True):
            weight = torch.ones(logits.shape[-1])
            weight[0] = NONE_WEIGHT if logits.shape[-1] == CLASSES[0] else 1
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), weight, ignore_index=-1)
        shapes = [(i, shape) for i, scene in enumerate(scenes) for shape in scene.shapes]
        places = torch.tensor([[shape.x / SIDE, shape.y / SIDE] for _, shape in shapes])
        found = self.place(hidden[[i for i, _ in shapes], [shape.patch for _, shape in shapes]])
        counts = self.count(hidden[:, -1]).view(-1, MAX_COUNT + 1)
        counted = nn.functional.cross_entropy(counts, count_targets(scenes).flatten())
        return loss + 20 * nn.functional.mse_loss(found, places) + counted


def count_targets(scenes: list[Scene]) -> torch.Tensor:
    """Return the number of shapes in all, of each kind and of each color, `[num_scenes, 13]`."""
    return torch.tensor(
        [
            [len(scene.shapes)]
            + [sum(shape.kind == kind for shape in scene.shapes) for kind in SHAPES]
            + [sum(shape.color == color for shape in scene.shapes) for color in COLORS]
            for scene in scenes
        ]
    )


def main() -> None:
    """Train the vision tower and the patch heads."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--size", type=int, default=32, help="pictures per batch")
    parser.add_argument("--lr", type=float, default=6e-3)
    args = parser.parse_args()
    set_up(7)
    model = build_model(build_config(AutoTokenizer.from_pretrained(CHECKPOINTS / "tokenizer")), seed=7)
    rng = random.Random(7)
    tower = model.model.embed_tokens_extend.image_embed.img_processor
    width = model.config.vision_config.hidden_size
    heads, mask_head = PatchHeads(width), nn.Linear(width, MASK_SIDE**2)
    read_out = [*heads.parameters(), *mask_head.parameters()]
    optimizer = optimizer_for([(tower, args.lr, 0.02), (read_out, 1.5e-3, 0.0)])

    def step_loss(step: int) -> torch.Tensor:
        scenes = [pictures.sample_scene(rng) for _ in range(args.size)]
        images, masks = zip(*map(pictures.draw_with_mask, scenes), strict=True)
        hidden = tower(normalized(images), output_hidden_states=True).hidden_states
        inside = nn.functional.binary_cross_entropy_with_logits(mask_head(hidden[MASK_LAYER]), mask_targets(masks))
        return heads.loss(hidden[-1], scenes) + 5 * inside

    @torch.no_grad()
    def evaluate() -> str:
        held_out = random.Random("held-out patches")
        scenes = [pictures.sample_scene(held_out) for _ in range(300)]
        hidden = patch_features(model, pixels(scenes))
        logits = heads.shape(hidden).split(CLASSES, dim=-1)
        targets = patch_targets(scenes)
        chosen = targets[..., 1] >= 0
        counts = heads.count(hidden[:, -1]).view(len(scenes), NUM_COUNTS, -1).argmax(-1)
        counted = float((counts == count_targets(scenes)).float().mean())
        return f"counts {counted:.3f}, " + ", ".join(
            f"{name} {float((part.argmax(-1) == target)[chosen].float().mean()):.3f}"
            for name, part, target in zip(("kind", "color", "size"), logits, targets.unbind(-1), strict=True)
        )

    checkpoint = Checkpoint(CHECKPOINTS / "patches.pt", {"tower": tower, "heads": heads, "mask": mask_head}, optimizer)
    train(checkpoint, step_loss, args.steps, evaluate=evaluate)


if __name__ == "__main__":
    main()
