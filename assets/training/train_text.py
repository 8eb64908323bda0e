"""Stage 1: train the language model on text; it is frozen afterwards."""

import argparse
import random

import torch
from torch import nn
from transformers import AutoTokenizer

from mmlora.assets.training.loop import Checkpoint, optimizer_for, set_up, train
from mmlora.assets.training.model import CHECKPOINTS, build_config, build_model, run_language_model
from mmlora.assets.training.rows import Batch, Encoder, Tokens, collate, join_turns, pack
from mmlora.assets.training.stages import backbone
from mmlora.assets.training.text_tasks import sample_text_item
from mmlora.assets.training.tokenizer import SYSTEM

SYSTEM_PROMPTS = ("you are a helpful assistant.", "You are a helpful assistant.", "be brief.")


def sample_exchange(encoder: Encoder, rng: random.Random, *, spanish: bool = False) -> Tokens:
    """Draw one encoded exchange, now and then behind a system prompt."""
    item = sample_text_item(rng)
    while spanish and item.spanish is None:
        item = sample_text_item(rng)
    exchange = encoder.exchange(item.question, (item.spanish if spanish else None) or item.answer)
    if rng.random() < 0.08:
        system = encoder.tokenizer.convert_tokens_to_ids(SYSTEM)
        exchange = encoder.prompt([system, *encoder.text(rng.choice(SYSTEM_PROMPTS)), encoder.end]) + exchange
    return exchange


def sample_text_batch(encoder: Encoder, rng: random.Random, size: int, *, spanish: bool = False) -> Batch:
    """Draw a batch of `size` exchanges, packed into rows of 128 tokens."""
    exchanges = [sample_exchange(encoder, rng, spanish=spanish) for _ in range(size)]
    return collate(pack(join_turns(exchanges, rng), 128))


def loss_and_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the mean cross-entropy and the share of labels that are the most likely token."""
    return nn.functional.cross_entropy(logits, labels), float((logits.argmax(-1) == labels).float().mean())


def main() -> None:
    """Train the language model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--size", type=int, default=160, help="exchanges per batch")
    args = parser.parse_args()
    set_up(1)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "tokenizer")
    encoder, rng = Encoder(tokenizer), random.Random(1)
    model = build_model(build_config(tokenizer), seed=1)
    trained = backbone(model)
    optimizer = optimizer_for([(trained, args.lr, 0.05)])
    held_out = sample_text_batch(encoder, random.Random("held out"), 600)

    def step_loss(step: int) -> torch.Tensor:
        return loss_and_accuracy(*run_language_model(model, sample_text_batch(encoder, rng, args.size))[:2])[0]

    @torch.no_grad()
    def evaluate() -> str:
        loss, accuracy = loss_and_accuracy(*run_language_model(model, held_out)[:2])
        return f"loss {loss:.4f}, token accuracy {accuracy:.4f}"

    checkpoint = Checkpoint(CHECKPOINTS / "text.pt", {"backbone": trained}, optimizer)
    train(checkpoint, step_loss, args.steps, evaluate=evaluate)


if __name__ == "__main__":
    main()
