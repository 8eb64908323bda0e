"""Attention over the paged KV cache, behind `transformers.AttentionInterface`.

The decoder runs all scheduled tokens flattened as `[1, num_tokens]`. Which of them belong to which sequence, and where
keys and values live, is in the `AttentionMetadata` of the current forward.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from mmlora.towers.base import BidirectionalSpan

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
class Span:
    """What a step computes of one sequence: its tokens `[start, end)`, and the blocks that hold all before `end`."""

    block_table: Sequence[int]
    start: int
    end: int
    is_long: bool = False  # beyond the length at which longrope changes its factors
    bidirectional_spans: tuple[BidirectionalSpan, ...] = ()  # that hold tokens of this step


@dataclass(frozen=True, eq=False)
class QueryGroup:
    """Sequences with equally many tokens in this step, attended to together.

    Args:
        rows: `[num_seqs * query_len]`, their rows in the flattened batch.
        slots: `[num_seqs, context_len]`, the rows of the cache with their contexts; shorter ones are padded.
        positions: `[num_seqs, query_len]`, where their tokens of this step stand.
        is_even: no context is padded.
        bidirectional_spans: spans of the sequence whose tokens all attend to each other; empty for several sequences.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    is_even: bool
    bidirectional_spans: tuple[BidirectionalSpan, ...] = ()
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, sliding_window: int | None) -> torch.Tensor | None:
        """`[num_seqs, 1, query_len, context_len]` bool: which positions a token sees; None when it sees all."""
        (_, query_len), (_, context_len) = self.positions.shape, self.slots.shape
        if query_len == 1 and self.is_even and context_len <= (sliding_window or context_len):
            return None
        if sliding_window not in self._masks:
            queries, keys = self.positions[:, None, :, None], torch.arange(context_len, device=self.slots.device)
            seen = _with_spans(keys <= queries, self.bidirectional_spans, queries, keys)
            if sliding_window is not None:
                beyond = [span for span in self.bidirectional_spans if span.ignores_window]
                seen = _with_spans(seen & (keys > queries - sliding_window), beyond, queries, keys)
            self._masks[sliding_window] = seen
        return self._masks[sliding_window]


def _with_spans(
    seen: torch.Tensor, spans: Sequence[BidirectionalSpan], queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Let the tokens of each span see each other, too."""
    for span in spans:
        seen = seen | (_is_inside(span, queries) & _is_inside(span, keys))
    return seen


def _is_inside(span: BidirectionalSpan, positions: torch.Tensor) -> torch.Tensor:
    return (positions >= span.start) & (positions < span.end)


@dataclass(frozen=True)
class AttentionMetadata:
    """One forward's view of the KV cache, filled by the model runner.

    Args:
        kv_cache: of the engine.
        write_slots: `[num_tokens]` row of the cache where each token's key and value go.
        groups: every sequence once. Those with one token are grouped by the length of their contexts.
        is_long: `[num_tokens]` bool, tokens of sequences with the long factors of longrope; None when there are none.
    """

    kv_cache: KVCache
    write_slots: torch.Tensor
    groups: list[QueryGroup]
    is_long: torch.Tensor | None = None

    @classmethod
    def build(cls, kv_cache: KVCache, spans: Sequence[Span]) -> "AttentionMetadata":
        """Prepare a forward over sequences, whose tokens lie one after the other in the flattened batch."""
        device = kv_cache.keys.device
        slots = [_slots(span, kv_cache.block_size) for span in spans]
        write_slots = torch.cat([found[span.start :] for found, span in zip(slots, spans, strict=True)])
        first_rows = [*itertools.accumulate((span.end - span.start for span in spans), initial=0)]
        members: dict[object, list[int]] = defaultdict(list)
        for index, span in enumerate(spans):
            # Contexts that differ by less than a factor of two share a group: little is computed in vain.
            members[
                index if span.end - span.start > 1 or span.bidirectional_spans else f"2^{span.end.bit_length()}"
            ].append(index)
        groups = [
            QueryGroup(
                torch.tensor([row for i in found for row in range(first_rows[i], first_rows[i + 1])], device=device),
                pad_sequence([slots[i] for i in found], batch_first=True).to(device),
                torch.tensor([list(range(spans[i].start, spans[i].end)) for i in found], device=device),
                is_even=len({spans[i].end for i in found}) == 1,
                bidirectional_spans=spans[found[0]].bidirectional_spans,
            )
            for found in members.values()
        ]
        is_long = None
        if any(span.is_long for span in spans):
            is_long = torch.tensor([span.is_long for span in spans for _ in range(span.start, span.end)], device=device)
        return cls(kv_cache, write_slots.to(device), groups, is_long)


def _slots(span: Span, block_size: int) -> torch.Tensor:
    """`[end]`: the rows of the cache that hold a sequence, up to the end of this step."""
    blocks = torch.tensor(span.block_table)[:, None] * block_size + torch.arange(block_size)
    return blocks.flatten()[: span.end]


_current: ContextVar[AttentionMetadata | None] = ContextVar("attention_metadata", default=None)


def current_attention() -> AttentionMetadata | None:
    """Return the metadata of the decoder forward that is running in this thread, None outside of one."""
    return _current.get()


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

    queries = query[0].transpose(0, 1)  # [num_tokens, num_heads, head_dim]
    output = queries.new_empty(*queries.shape[:2], values.shape[-1])
    for group in metadata.groups:
        num_seqs, query_len = group.positions.shape
        attended = attend(
            queries[group.rows].view(num_seqs, query_len, *queries.shape[1:]).transpose(1, 2),
            _gather(keys, group.slots),
            _gather(values, group.slots),
            group.mask(sliding_window),
            scaling=scaling,
            softcap=softcap,
        )
        output[group.rows] = attended.transpose(1, 2).flatten(0, 1)
    return output[None], None


def _gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Read the contexts of a group from one layer of the cache, `[num_seqs, num_kv_heads, context_len, head_dim]`."""
    rows = cache.index_select(0, slots.flatten())  # several times faster than indexing with two dimensions
    return rows.view(*slots.shape, *cache.shape[1:]).transpose(1, 2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attend from the tokens of a group to their contexts.

    Args:
        query: `[num_seqs, num_heads, query_len, head_dim]`.
        key, value: `[num_seqs, num_kv_heads, context_len, head_dim]`.
        mask: `[num_seqs, 1, query_len, context_len]` bool, True where a token sees a position; None for everywhere.

    Returns:
        `[num_seqs, num_heads, query_len, head_dim]`.
    """
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


AttentionInterface.register(ATTENTION_NAME, paged_attention)
