"""The optimizer, schedule, logging and checkpoints that every training stage shares."""

import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def set_up(seed: int) -> None:
    """Seed torch and use one thread, so that two stages can run side by side on two cores."""
    torch.manual_seed(seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def optimizer_for(groups: list[tuple[Iterable[nn.Parameter], float, float]]) -> torch.optim.AdamW:
    """Build AdamW from `(parameters, learning rate, weight decay)` groups."""
    return torch.optim.AdamW(
        [{"params": list(p), "lr": lr, "base_lr": lr, "weight_decay": wd} for p, lr, wd in groups],
        betas=(0.9, 0.98),
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: int = 50) -> None:
    """Warm up linearly, then follow a cosine to 2 % of each group's base rate."""
    progress = min(1.0, step / steps)
    scale = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale


class Checkpoint:
    """A resumable file of a stage's trained tensors, optimizer state and step."""

    def __init__(self, path: Path, modules: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        self.path, self.modules, self.optimizer = path, modules, optimizer

    def save(self, step: int) -> None:
        """Write the checkpoint atomically."""
        state: dict[str, Any] = {name: module.state_dict() for name, module in self.modules.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save({"step": step, "optimizer": self.optimizer.state_dict(), **state}, temporary)
        temporary.rename(self.path)

    def resume(self) -> int:
        """Load the checkpoint if there is one and return the step to go on from."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def train(
    checkpoint: Checkpoint,
    step_loss: Callable[[int], torch.Tensor],
    steps: int,
    *,
    evaluate: Callable[[], str],
    log_every: int = 25,
    evaluate_every: int = 200,
) -> None:
    """Run a stage: one optimizer step per call of `step_loss`, with logs, held-out metrics and checkpoints.

    The file `STOP` beside the checkpoint's name (`<name>.stop`) ends a stage early, after a last checkpoint.
    """
    optimizer = checkpoint.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stop = checkpoint.path.with_suffix(".stop")
    began, total = time.time(), 0.0
    for step in range(checkpoint.resume(), steps):
        set_learning_rate(optimizer, step, steps)
        loss = step_loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % log_every == 0:
            print(f"step {step + 1} loss {total / log_every:.4f} {time.time() - began:.0f} s", flush=True)
            total = 0.0
        if (step + 1) % evaluate_every == 0 or step + 1 == steps or stop.exists():
            checkpoint.save(step + 1)
            print(f"step {step + 1} held out: {evaluate()}", flush=True)
        if stop.exists():
            break
