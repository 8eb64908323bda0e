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
    """Seed torch and use one thread, so that two stages can run in parallel on two cores."""
    torch.manual_seed(seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


class Optimizer:
    """Muon for the weights of hidden linear layers, AdamW for everything else, as one optimizer.

    Muon (Jordan et al., 2024) makes each update of a matrix nearly orthogonal. Its step is scaled to the size of
    AdamW's, so that one learning rate serves both.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, betas=(0.9, 0.98), fused=True)]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def optimizer_for(groups: list[tuple[nn.Module | Iterable[nn.Parameter], float, float]]) -> Optimizer:
    """Build the optimizer from `(what to train, learning rate, weight decay)` groups.

    Linear layers inside a module are trained with Muon; parameters passed individually with AdamW.
    """
    matrices, others = [], []
    for trained, lr, weight_decay in groups:
        options = {"lr": lr, "base_lr": lr, "weight_decay": weight_decay}
        hidden: list[nn.Parameter] = []
        if isinstance(trained, nn.Module):
            hidden = [m.weight for m in trained.modules() if isinstance(m, nn.Linear)]
            matrices.append({"params": hidden, **options})
            trained = trained.parameters()
        chosen = {id(p) for p in hidden}
        others.append({"params": [p for p in trained if id(p) not in chosen], **options})
    return Optimizer(matrices, others)


def set_learning_rate(optimizer: Optimizer, step: int, steps: int, warmup: int = 50) -> None:
    """Warm up linearly, then follow a cosine to 2 % of each group's base rate."""
    progress = min(1.0, step / steps)
    scale = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale


class Checkpoint:
    """A resumable file of a stage's trained tensors, optimizer state and step."""

    def __init__(self, path: Path, modules: dict[str, Any], optimizer: Optimizer) -> None:
        self.path, self.modules, self.optimizer = path, modules, optimizer

    def save(self, step: int) -> None:
        """Write the checkpoint atomically."""
        state: dict[str, Any] = {name: module.state_dict() for name, module in self.modules.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save({"step": step, "optimizer": self.optimizer.state_dict(), **state}, temporary)
        temporary.rename(self.path)

    def resume(self) -> int:
        """Load the checkpoint if there is one and return the step to resume from."""
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

    The file `<name>.stop` next to the checkpoint ends a stage early, after a last checkpoint.
    """
    optimizer = checkpoint.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stop = checkpoint.path.with_suffix(".stop")
    began, total = time.time(), 0.0
    for step in range(checkpoint.resume(), steps):
        set_learning_rate(optimizer, step, steps)
        loss = step_loss(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total += loss.item()
        if not math.isfinite(total):
            raise RuntimeError(f"the loss of step {step} is {loss.item()}; the last checkpoint is {checkpoint.path}")
        if (step + 1) % log_every == 0:
            print(f"step {step + 1} loss {total / log_every:.4f} {time.time() - began:.0f} s", flush=True)
            total = 0.0
        if (step + 1) % evaluate_every == 0 or step + 1 == steps or stop.exists():
            checkpoint.save(step + 1)
            print(f"step {step + 1} held out: {evaluate()}", flush=True)
        if stop.exists():
            break
