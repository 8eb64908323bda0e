"""What a decoder forward needs to know about its sequences: `Span`, `AttentionMetadata`, and the current context."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from mmlora.towers.base import BidirectionalSpan


@dataclass(frozen=True)
class Span:
    """What a step computes of one sequence: its tokens `[start, end)`, and the blocks that hold all before `end`."""

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
    """One forward's view of the KV cache; each attention backend has its own subclass.

    Args:
        spans: the sequences, whose tokens lie one after the other in the flattened batch.
        device: of the model.

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
            scaling: of the scores, by default `head_dim ** -0.5`.
            sliding_window: a token sees itself and the `sliding_window - 1` before it.
            softcap: scores become `softcap * tanh(scores / softcap)`.

        Returns:
            `[num_tokens, num_heads, head_dim]`.
        """


_current: ContextVar[AttentionMetadata | None] = ContextVar("attention_metadata", default=None)


def current_attention() -> AttentionMetadata | None:
    """Return the metadata of the decoder forward that is running in this thread, None outside of one."""
    return _current.get()


@contextmanager
def attention_context(metadata: AttentionMetadata) -> Iterator[None]:
    """Make `metadata` current for the decoder forward inside the block.

    Raises:
        RuntimeError: a forward is already running; contexts do not nest.
    """
    if _current.get() is not None:
        raise RuntimeError("a decoder forward is already running in this thread")
    token = _current.set(metadata)
    try:
        yield
    finally:
        _current.reset(token)
