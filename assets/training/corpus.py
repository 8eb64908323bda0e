"""Read the rendered speech corpus and serve batches of clips of one length."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmlora.assets.training.model import CHECKPOINTS

SPEECH = CHECKPOINTS / "speech"


class Corpus:
    """The utterances of a folder of shards, grouped by their number of frames."""

    def __init__(self, folder: Path = SPEECH) -> None:
        self.items: list[dict[str, Any]] = []
        self.shards: dict[int, np.ndarray] = {}
        for path in sorted(folder.glob("items-*.json")):
            index = int(path.stem.split("-")[1])
            self.shards[index] = np.load(folder / f"features-{index}.npy", mmap_mode="r")
            self.items += [{**item, "shard": index} for item in json.loads(path.read_text())]

    def features(self, item: dict[str, Any]) -> np.ndarray:
        """Return the features of one utterance, `[num_frames, 80]` fp16."""
        return self.shards[item["shard"]][item["start"] : item["start"] + item["frames"]]

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and inverse standard deviation per mel bin over a sample of the corpus."""
        sample = np.concatenate([self.features(item) for item in self.items[:500]]).astype(np.float32)
        return torch.tensor(sample.mean(0)), torch.tensor(1 / sample.std(0))

    def batches(self, rng: random.Random, num_frames: int) -> list[list[dict[str, Any]]]:
        """Split the corpus into shuffled batches of one length and about `num_frames` frames in all."""
        by_length: dict[int, list[dict[str, Any]]] = {}
        for item in self.items:
            by_length.setdefault(item["frames"], []).append(item)
        batches = []
        for length, items in by_length.items():
            rng.shuffle(items)
            size = max(1, num_frames // length)
            batches += [items[i : i + size] for i in range(0, len(items), size)]
        rng.shuffle(batches)
        return batches

    def load(self, batch: list[dict[str, Any]], rng: random.Random | None = None) -> torch.Tensor:
        """Stack a batch `[num_clips, num_frames, 80]` fp32, with SpecAugment and jitter if `rng` is given."""
        features = torch.from_numpy(np.stack([self.features(item) for item in batch]).astype(np.float32))
        return features if rng is None else _augment(features, rng)


def _augment(features: torch.Tensor, rng: random.Random) -> torch.Tensor:
    features = features[:, : features.shape[1] - rng.randrange(4)]
    features = features + 0.1 * torch.randn_like(features)
    for clip in features:
        clip += rng.uniform(-1.0, 1.0)
        fill = float(clip.mean())
        for _ in range(2):
            width, first = rng.randint(0, 7), rng.randrange(70)
            clip[:, first : first + width] = fill
            width, first = rng.randint(0, 7), rng.randrange(max(1, len(clip) - 7))
            clip[first : first + width] = fill
    return features.clamp_min(0)
