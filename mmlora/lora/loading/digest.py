"""Digests of adapters: what their identity rests on."""

import hashlib
import json
from collections.abc import Mapping

import torch

from mmlora.lora.loading.peft_config import PeftConfig
from mmlora.lora.weights import ModuleWeights


def adapter_digest(config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of everything that decides what an adapter computes: configuration and all tensors."""
    digest = hashlib.sha256(canonical(config.digest_content()))
    for key in sorted(tensors):
        _update(digest, key, tensors[key])
    return digest.hexdigest()


def media_digest(modules: Mapping[str, ModuleWeights]) -> str | None:
    """Return the sha256 of the tower and connector modules of an adapter, None if it has none.

    Args:
        modules: these modules alone.
    """
    if not modules:
        return None
    digest = hashlib.sha256(b"tower and connector")
    for module, weights in sorted(modules.items()):
        digest.update(canonical([module, weights.scalings]))
        for name, tensor in weights.tensors:
            _update(digest, name, tensor)
    return digest.hexdigest()


def canonical(content: object) -> bytes:
    """Return one encoding of JSON content."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _update(digest: "hashlib._Hash", key: str, tensor: torch.Tensor) -> None:
    digest.update(canonical([key, str(tensor.dtype), list(tensor.shape)]))
    if tensor.numel():
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
