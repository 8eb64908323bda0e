"""Stage 2: warm up the audio tower with a character CTC head, which is discarded afterwards."""

import argparse
import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from mmlora.assets.training.alignment import forced_alignment, word_spans
from mmlora.assets.training.corpus import SPEECH, Corpus
from mmlora.assets.training.loop import Checkpoint, optimizer_for, set_up, train
from mmlora.assets.training.metrics import word_errors
from mmlora.assets.training.model import CHECKPOINTS, audio_hidden, build_config, build_model

ALPHABET = "_ abcdefghijklmnopqrstuvwxyz"


def ctc_loss(head: nn.Linear, hidden: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """Character CTC loss of hidden states `[num_clips, num_steps, 144]`, mean over the batch."""
    targets = [torch.tensor([ALPHABET.index(c) for c in text]) for text in texts]
    log_probs = head(hidden).log_softmax(-1).transpose(0, 1)
    lengths = torch.full((len(texts),), len(log_probs))
    return nn.functional.ctc_loss(
        log_probs, torch.cat(targets), lengths, torch.tensor([len(t) for t in targets]), zero_infinity=True
    )


def ctc_decode(head: nn.Linear, hidden: torch.Tensor) -> list[str]:
    """Decode greedily: merge repeats, drop blanks."""
    texts = []
    for row in head(hidden).argmax(-1).tolist():
        texts.append("".join(ALPHABET[c] for c, _ in itertools.groupby(row) if c))
    return texts


@torch.no_grad()
def align_words(head: nn.Linear, hidden: torch.Tensor, texts: list[str]) -> list[list[tuple[int, int]]]:
    """Return for each clip the first and last step of every word of its text."""
    log_probs = head(hidden).log_softmax(-1).numpy()
    paths = forced_alignment(log_probs, [[ALPHABET.index(c) for c in text] for text in texts])
    return [word_spans(path, text) for path, text in zip(paths, texts, strict=True)]


def endless_batches(corpus: Corpus, rng: random.Random, num_frames: int) -> Iterator[list[dict[str, Any]]]:
    """Iterate over the corpus forever, in a new order each time."""
    while True:
        yield from corpus.batches(rng, num_frames)


def main() -> None:
    """Train the audio tower and the CTC head."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--frames", type=int, default=8_000, help="frames per batch")
    args = parser.parse_args()
    set_up(2)
    model = build_model(build_config(AutoTokenizer.from_pretrained(CHECKPOINTS / "tokenizer")), seed=2)
    corpus, rng = Corpus(), random.Random(2)
    held_out = {name: Corpus(SPEECH / name) for name in ("seen", "unseen")}
    encoder = model.model.embed_tokens_extend.audio_embed.encoder
    norm = encoder.encoder_embedding
    norm.global_mean, norm.global_invstd = corpus.statistics()
    head = nn.Linear(model.config.audio_config.hidden_size, len(ALPHABET))
    optimizer = optimizer_for([(encoder, args.lr, 0.01), (head.parameters(), 1.5e-3, 0.0)])
    batches = endless_batches(corpus, rng, args.frames)

    def step_loss(step: int) -> torch.Tensor:
        batch = next(batches)
        return ctc_loss(head, audio_hidden(model, corpus.load(batch, rng)), [item["text"] for item in batch])

    @torch.no_grad()
    def evaluate() -> str:
        report = []
        for name, clips in held_out.items():
            errors = words = 0
            for batch in clips.batches(random.Random(0), 20_000):
                for item, text in zip(batch, ctc_decode(head, audio_hidden(model, clips.load(batch))), strict=True):
                    errors += word_errors(item["text"], text)
                    words += len(item["text"].split())
            report.append(f"{name} WER {errors / words:.3f}")
        return ", ".join(report)

    checkpoint = Checkpoint(CHECKPOINTS / "ctc.pt", {"encoder": encoder, "head": head}, optimizer)
    train(checkpoint, step_loss, args.steps, evaluate=evaluate)


if __name__ == "__main__":
    main()
