"""Attention over the paged KV cache, behind `transformers.AttentionInterface`.

The decoder runs all scheduled tokens flattened as `[1, num_tokens]`. Which of them belong to which sequence, and where
keys and values live, is in the `AttentionMetadata` of the current forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION_NAME = "mmlora_paged"


class KVCache:
    """Keys and values of every layer, in blocks.

    Args:
        num_layers, num_blocks, block_size, num_kv_heads, head_dim: the shape; one layer is
            `[num_blocks * block_size, num_kv_heads, head_dim]` for keys and the same for values.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        shape = (num_layers, num_blocks * block_size, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class AttentionMetadata:
    """One forward's view of the KV cache, filled by the model runner.

    Args:
        kv_cache: of the engine.
        write_slots: `[num_tokens]` row of the cache where each token's key and value go.
        read_slots: per sequence `[context_len]`, the rows of all its tokens so far, this step's included.
        query_lens: per sequence, tokens in this step; the rows of the flattened batch lie in this order.
    """

    kv_cache: KVCache
    write_slots: torch.Tensor
    read_slots: list[torch.Tensor]
    query_lens: list[int]


_current: ContextVar[AttentionMetadata | None] = ContextVar("attention_metadata", default=None)


@contextmanager
def attention_context(metadata: AttentionMetadata) -> Iterator[None]:
    """Make `metadata` that of the decoder forward inside the block; contexts do not nest."""
    if _current.get() is not None:
        raise RuntimeError("a decoder forward is already running in this thread")
    token = _current.set(metadata)
    try:
        yield
    finally:
        _current.reset(token)


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
    """Write this step's keys and values, then attend over each sequence's context.

    Args:
        query: `[1, num_heads, num_tokens, head_dim]`.
        key, value: `[1, num_kv_heads, num_tokens, head_dim]`.
        attention_mask: ignored; causality follows from the metadata.
        scaling: of the scores, by default `head_dim ** -0.5`.
        sliding_window: a token sees itself and the `sliding_window - 1` before it.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: attention sinks.

    Raises:
        ValueError: the model has attention sinks, which are not supported.

    Returns:
        `[1, num_tokens, num_heads, head_dim]`, and no attention weights.
    """
    metadata = _current.get()
    if metadata is None:
        raise RuntimeError("paged attention was called outside of a decoder forward")
    if s_aux is not None:
        raise ValueError("this model's attention has sinks (s_aux), which are not supported")
    keys = metadata.kv_cache.keys[module.layer_idx]  # type: ignore[index]
    values = metadata.kv_cache.values[module.layer_idx]  # type: ignore[index]
    keys[metadata.write_slots] = key[0].transpose(0, 1)
    values[metadata.write_slots] = value[0].transpose(0, 1)

    outputs = []
    for rows, query_rows in zip(metadata.read_slots, torch.split(query, metadata.query_lens, dim=2), strict=True):
        outputs.append(
            attend(
                query_rows,
                keys[rows].transpose(0, 1)[None],  # [1, num_kv_heads, context_len, head_dim]
                values[rows].transpose(0, 1)[None],
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attend from the last `query_len` positions of a context to all of it, causally.

    Args:
        query: `[1, num_heads, query_len, head_dim]`.
        key, value: `[1, num_kv_heads, context_len, head_dim]`.

    Returns:
        `[1, num_heads, query_len, head_dim]`.
    """
    query_len, context_len = query.shape[2], key.shape[2]
    mask = None
    if query_len > 1 or (sliding_window is not None and context_len > sliding_window):
        mask = causal_mask(query_len, context_len, sliding_window, query.device)
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    scale = scaling if scaling is not None else query.shape[3] ** -0.5
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights @ value.repeat_interleave(groups, 1)


def causal_mask(query_len: int, context_len: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """`[query_len, context_len]` bool: which positions of the context the last `query_len` of them see."""
    queries = torch.arange(context_len - query_len, context_len, device=device)[:, None]
    positions = torch.arange(context_len, device=device)[None, :]
    mask = positions <= queries
    if sliding_window is not None:
        mask &= positions > queries - sliding_window
    return mask


AttentionInterface.register(ATTENTION_NAME, paged_attention)
