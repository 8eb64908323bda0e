"""`AttentionBackend`: how keys and values are stored and attended to, behind `transformers.AttentionInterface`.

The decoder runs all scheduled tokens flattened as `[1, num_tokens]`. Every attention layer of the model calls
`paged_attention`, which forwards to the `AttentionMetadata` of the current forward pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from mmlora.attention.kv_cache import KVCache, KVLayout
from mmlora.towers.base import BidirectionalSpan

ATTENTION_NAME = "mmlora_paged"


@dataclass(frozen=True)
class Span:
    """The part of one sequence that a step computes: tokens `[start, end)`, and its KV blocks up to `end`."""

    block_table: tuple[int, ...]
    start: int
    end: int
    uses_long_rope_factors: bool = False
    bidirectional_spans: tuple[BidirectionalSpan, ...] = ()  # those that overlap `[start, end)`

    @property
    def num_tokens(self) -> int:
        """Number of tokens computed."""
        return self.end - self.start


class AttentionMetadata(ABC):
    """Metadata of one forward pass; each attention backend has its own subclass.

    Args:
        spans: the sequences, whose tokens are concatenated in the flattened batch.
        device: device of the model.

    Attributes:
        uses_long_rope_factors: `[num_tokens]` bool, tokens of sequences with the long factors of longrope; None when
            there are none.
    """

    def __init__(self, spans: list[Span], device: torch.device) -> None:
        self.uses_long_rope_factors: torch.Tensor | None = None
        if any(span.uses_long_rope_factors for span in spans):
            flags = [span.uses_long_rope_factors for span in spans for _ in range(span.num_tokens)]
            self.uses_long_rope_factors = torch.tensor(flags, device=device)

    @abstractmethod
    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Write this step's keys and values of one layer, then attend over each sequence's context.

        Args:
            layer: index of the layer.
            query: `[num_tokens, num_heads, head_dim]`.
            key, value: `[num_tokens, num_kv_heads, head_dim]`.
            scaling: factor of the scores, by default `head_dim ** -0.5`.
            sliding_window: each token attends to itself and the `sliding_window - 1` tokens before it.
            softcap: scores become `softcap * tanh(scores / softcap)`.

        Returns:
            `[num_tokens, num_heads, head_dim]`.
        """


class AttentionBackend(Protocol):
    """An implementation of attention over a paged KV cache."""

    def allocate(self, layout: KVLayout, num_blocks: int, device: torch.device) -> KVCache:
        """Allocate a KV cache in the shape that the backend reads and writes."""
        ...

    def build_metadata(self, kv_cache: KVCache, spans: list[Span]) -> AttentionMetadata:
        """Prepare a forward pass over sequences whose tokens are concatenated in the flattened batch."""
        ...


_current: ContextVar[AttentionMetadata | None] = ContextVar("attention_metadata", default=None)


def current_attention() -> AttentionMetadata | None:
    """Return the metadata of the forward pass that is running in this thread, None outside of one."""
    return _current.get()


@contextmanager
def attention_context(metadata: AttentionMetadata) -> Iterator[None]:
    """Make `metadata` current for the forward pass inside the block.

    Raises:
        RuntimeError: a forward pass is already running; contexts do not nest.
    """
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
    """Run one attention layer of the current forward pass, as a function for `transformers.AttentionInterface`.

    Args:
        module: the attention layer.
        query: `[1, num_heads, num_tokens, head_dim]`.
        key, value: `[1, num_kv_heads, num_tokens, head_dim]`.
        attention_mask: ignored; the metadata has the masks.
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
