"""Paged attention: the KV cache, the metadata of a forward, and the backends."""

import torch

from mmlora.attention.backend import AttentionBackend
from mmlora.attention.paged import SDPABackend


def choose_backend(device: torch.device) -> AttentionBackend:
    """Return the attention backend for a device; `SDPABackend` runs on every device."""
    return SDPABackend()
