"""`AttentionBackend`: how keys and values are stored and attended to, behind `transformers.AttentionInterface`.

The decoder runs all scheduled tokens flattened as `[1, num_tokens]`. Every attention layer of the model calls
`paged_attention`, which passes the layer on to the metadata of the current forward.
"""

from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from mmlora.attention.kv_cache import KVCache, KVLayout
from mmlora.attention.metadata import AttentionMetadata, Span, current_attention
from mmlora.attention.paged import SDPABackend

ATTENTION_NAME = "mmlora_paged"


class AttentionBackend(Protocol):
    """One implementation of attention over a paged KV cache."""

    def block_bytes(self, layout: KVLayout) -> int:
        """Return the bytes of one block in all layers."""
        ...

    def allocate(self, layout: KVLayout, num_blocks: int, device: torch.device) -> KVCache:
        """Allocate a KV cache in the shape that the backend reads and writes."""
        ...

    def build_metadata(self, kv_cache: KVCache, spans: list[Span]) -> AttentionMetadata:
        """Prepare a forward over sequences whose tokens lie one after the other in the flattened batch."""
        ...


def choose_backend(device: torch.device) -> AttentionBackend:
    """Return the attention backend for a device; `SDPABackend` runs on every device."""
    return SDPABackend()


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Run one attention layer of the current forward; the signature is that of `transformers.AttentionInterface`.

    Args:
        module: the attention layer.
        query: `[1, num_heads, num_tokens, head_dim]`.
        key, value: `[1, num_kv_heads, num_tokens, head_dim]`.
        attention_mask: ignored; the metadata determines causality.
        scaling, sliding_window, softcap: see `AttentionMetadata.attend`.
        s_aux: attention sinks.

    Raises:
        ValueError: the model has attention sinks, which are not supported.

    Returns:
        `[1, num_tokens, num_heads, head_dim]`, and no attention weights.
    """
    metadata = current_attention()
    if metadata is None:
        raise RuntimeError("paged attention was called outside of a decoder forward")
    if s_aux is not None:
        raise ValueError("this model's attention has sinks (s_aux), which are not supported")
    output = metadata.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return output[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
