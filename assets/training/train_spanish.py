"""Stage 6: train `spanish-lora`, Spanish answers to the base model's text tasks; everything else is frozen."""

import argparse
import random

import torch

from mmlora.assets.training.loop import Checkpoint, optimizer_for, set_up, train
from mmlora.assets.training.model import CHECKPOINTS, run_language_model
from mmlora.assets.training.rows import Encoder
from mmlora.assets.training.stages import attach_adapter, frozen_language_model
from mmlora.assets.training.train_text import loss_and_accuracy, sample_text_batch


def main() -> None:
    """Train the adapter."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--size", type=int, default=64, help="exchanges per batch")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    set_up(6)
    model, tokenizer = frozen_language_model(seed=6)
    encoder, rng = Encoder(tokenizer), random.Random(6)
    lora = attach_adapter(model, args.rank)
    optimizer = optimizer_for([(lora.layers, 3e-3, 0.0)])
    held_out = sample_text_batch(encoder, random.Random("held out"), 300, spanish=True)

    def step_loss(step: int) -> torch.Tensor:
        batch = sample_text_batch(encoder, rng, args.size, spanish=True)
        return loss_and_accuracy(*run_language_model(model, batch)[:2])[0]

    @torch.no_grad()
    def evaluate() -> str:
        loss, accuracy = loss_and_accuracy(*run_language_model(model, held_out)[:2])
        return f"loss {loss:.4f}, token accuracy {accuracy:.4f}"

    train(Checkpoint(CHECKPOINTS / "spanish.pt", {"lora": lora}, optimizer), step_loss, args.steps, evaluate=evaluate)


if __name__ == "__main__":
    main()
