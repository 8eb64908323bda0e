"""A loaded LoRA adapter on the host: its weights, its identity and the report of which modules matched."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from mmlora.lora.weights import ModuleWeights

PARTS: Final = ("language_model", "connector", "vision_tower", "audio_tower")

AdapterIdentity = tuple[int, str, int]
"""`(uid, digest, generation)`: the only valid cache key for anything that depends on an adapter."""


@dataclass(frozen=True)
class AdapterReport:
    """Result of matching an adapter's tensors with a model.

    Attributes:
        matched: number of modules that the adapter changes.
        parts: number of these modules in each part of the model.
        unmatched: tensors that match no module; empty unless loaded with `strict=False`.
        max_rank: largest rank of any module; 0 when none is low-rank.
    """

    matched: int
    parts: dict[str, int]
    unmatched: tuple[str, ...] = ()
    max_rank: int = 0


@dataclass(frozen=True, eq=False)
class Adapter:
    """One immutable version of an adapter. Requests and slots keep it alive by holding a reference.

    Attributes:
        name: for logs and errors only.
        digest: sha256 of the configuration and all tensors.
        media_digest: sha256 of the tower and connector tensors alone; None when there are none.
        path: the directory it was read from; None for an adapter from memory.
        modules: by the model's own module name.
        uid: number of the adapter in this process; 0 until it enters a `HostCache`.
        generation: number of in-place reloads.
        invocation_tokens: an activated LoRA (aLoRA) applies from their last occurrence in the prompt; empty for an
            adapter that applies to the whole prompt.
        needs_own_pass: whether it changes modules of the language model that support only one adapter per forward.
    """

    name: str
    digest: str
    media_digest: str | None
    path: Path | None
    modules: dict[str, ModuleWeights] = field(repr=False)
    report: AdapterReport
    uid: int = 0
    generation: int = 0
    invocation_tokens: tuple[int, ...] = ()
    needs_own_pass: bool = False

    @cached_property
    def identity(self) -> AdapterIdentity:
        return self.uid, self.digest, self.generation

    @property
    def num_bytes(self) -> int:
        return sum(weights.num_bytes for weights in self.modules.values())


def digest_adapter(config: object, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of everything that affects the output of an adapter.

    Args:
        config: the part of the configuration that affects the output, as JSON content.
        tensors: all tensors of the file.
    """
    digest = hashlib.sha256(canonical_json(config))
    for key in sorted(tensors):
        _update(digest, key, tensors[key])
    return digest.hexdigest()


def digest_media_modules(modules: Mapping[str, ModuleWeights]) -> str | None:
    """Return the sha256 of the tower and connector modules of an adapter; None when `modules` is empty."""
    if not modules:
        return None
    digest = hashlib.sha256(b"tower and connector")
    for module, weights in sorted(modules.items()):
        digest.update(canonical_json([module, weights.scalings]))
        for name, tensor in weights.tensors:
            _update(digest, name, tensor)
    return digest.hexdigest()


def canonical_json(content: object) -> bytes:
    """Return JSON content in a unique encoding: keys sorted, no spaces."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _update(digest: "hashlib._Hash", key: str, tensor: torch.Tensor) -> None:
    digest.update(canonical_json([key, str(tensor.dtype), list(tensor.shape)]))
    if tensor.numel():
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
