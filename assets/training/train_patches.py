"""Stage 4a: warm up the vision tower by telling, for every patch, which shape has its centre there.

The heads are thrown away after stage 4, which goes on using them as an auxiliary loss.
"""

import argparse
import random

import torch
from torch import nn

from mmlora.assets.training import pictures
from mmlora.assets.training.loop import Checkpoint, optimizer_for, set_up, train
from mmlora.assets.training.model import CHECKPOINTS
from mmlora.assets.training.pictures import SIDE, Scene
from mmlora.assets.training.stages import frozen_language_model
from mmlora.assets.training.world import COLORS, SHAPES, SIZES

PATCH = 14
PER_SIDE = SIDE // PATCH
NONE_WEIGHT = 0.05
CLASSES = (1 + len(SHAPES), len(COLORS), len(SIZES))


def patch_targets(scenes: list[Scene]) -> torch.Tensor:
    """Return `[num_scenes, 64, 3]`: kind (0 is none), color and size of the shape centred in each patch, or -1."""
    targets = torch.full((len(scenes), PER_SIDE**2, 3), -1)
    targets[..., 0] = 0
    for i, scene in enumerate(scenes):
        for s in scene.shapes:
            patch = int(s.y // PATCH) * PER_SIDE + int(s.x // PATCH)
            targets[i, patch] = torch.tensor([1 + SHAPES.index(s.kind), COLORS.index(s.color), SIZES.index(s.size)])
    return targets


def patch_heads(width: int) -> nn.Linear:
    """Return one linear layer that holds the classifiers of kind, color and size."""
    return nn.Linear(width, sum(CLASSES))


def patch_loss(heads: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum the cross-entropies of kind (all patches, those without a shape at 5 %), color and size (the others)."""
    loss = hidden.new_zeros(())
    for logits, target in zip(heads(hidden).split(CLASSES, dim=-1), targets.unbind(-1), strict=True):
        weight = torch.ones(logits.shape[-1])
        weight[0] = NONE_WEIGHT if logits.shape[-1] == CLASSES[0] else 1
        loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), weight, ignore_index=-1)
    return loss


def main() -> None:
    """Train the vision tower and the patch heads."""
    from mmlora.assets.training.train_vision import pixels

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--size", type=int, default=24, help="pictures per batch")
    args = parser.parse_args()
    set_up(7)
    model, _ = frozen_language_model(seed=4)
    rng = random.Random(7)
    tower = model.model.embed_tokens_extend.image_embed.img_processor.requires_grad_(True)
    heads = patch_heads(model.config.vision_config.hidden_size)
    optimizer = optimizer_for([([*tower.parameters(), *heads.parameters()], 1.5e-3, 0.02)])

    def hidden_states(scenes: list[Scene]) -> torch.Tensor:
        hidden: torch.Tensor = tower(pixels(scenes), output_hidden_states=True).hidden_states[-1]
        return hidden

    def step_loss(step: int) -> torch.Tensor:
        scenes = [pictures.sample_scene(rng) for _ in range(args.size)]
        return patch_loss(heads, hidden_states(scenes), patch_targets(scenes))

    @torch.no_grad()
    def evaluate() -> str:
        held_out = random.Random("held-out patches")
        scenes = [pictures.sample_scene(held_out) for _ in range(100)]
        logits = heads(hidden_states(scenes)).split(CLASSES, dim=-1)
        targets = patch_targets(scenes)
        chosen = targets[..., 1] >= 0
        return ", ".join(
            f"{name} {float((part.argmax(-1) == target)[chosen].float().mean()):.3f}"
            for name, part, target in zip(("kind", "color", "size"), logits, targets.unbind(-1), strict=True)
        )

    checkpoint = Checkpoint(CHECKPOINTS / "patches.pt", {"tower": tower, "heads": heads}, optimizer)
    train(checkpoint, step_loss, args.steps, evaluate=evaluate, evaluate_every=100)


if __name__ == "__main__":
    main()
