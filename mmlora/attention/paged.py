"""`SDPABackend`: gather each sequence's keys and values from the paged cache, then call PyTorch's SDPA.

It runs on every device. Sequences with one token each are attended to in groups of similar context length.
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from mmlora.attention.backend import AttentionMetadata, Span
from mmlora.attention.kv_cache import KVCache, KVLayout
from mmlora.towers.base import BidirectionalSpan


class SDPABackend:
    """Paged attention by `scaled_dot_product_attention` over gathered contexts; see `AttentionBackend`."""

    def allocate(self, layout: KVLayout, num_blocks: int, device: torch.device) -> KVCache:
        """Allocate keys and values `[num_layers, num_blocks * block_size, num_kv_heads, head_dim]`."""
        shape = layout.num_layers, num_blocks * layout.block_size, layout.num_kv_heads, layout.head_dim
        keys, values = (torch.zeros(shape, dtype=layout.dtype, device=device) for _ in range(2))
        return KVCache(layout.block_size, keys, values)

    def build_metadata(self, kv_cache: KVCache, spans: list[Span]) -> AttentionMetadata:
        """See `AttentionBackend.build_metadata`."""
        return SDPAMetadata(kv_cache, spans)


@dataclass(frozen=True, eq=False)
class QueryGroup:
    """Sequences with equally many tokens in this step, attended to together.

    Args:
        rows: `[num_seqs * query_len]`, their rows in the flattened batch.
        slots: `[num_seqs, context_len]`, the rows of the cache with their contexts; shorter ones are padded.
        positions: `[num_seqs, query_len]`, positions of their tokens of this step.
        is_even: no context is padded.
        bidirectional_spans: those of the sequence; empty for several sequences.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    is_even: bool
    bidirectional_spans: tuple[BidirectionalSpan, ...] = ()
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, sliding_window: int | None) -> torch.Tensor | None:
        """Return `[num_seqs, 1, query_len, context_len]` bool, True where a token attends; None if everywhere."""
        (_, query_len), (_, context_len) = self.positions.shape, self.slots.shape
        if query_len == 1 and self.is_even and context_len <= (sliding_window or context_len):
            return None
        if sliding_window not in self._masks:
            queries, keys = self.positions[:, None, :, None], torch.arange(context_len, device=self.slots.device)
            visible = _add_spans(keys <= queries, self.bidirectional_spans, queries, keys)
            if sliding_window is not None:
                unwindowed = tuple(span for span in self.bidirectional_spans if span.ignores_window)
                visible = _add_spans(visible & (keys > queries - sliding_window), unwindowed, queries, keys)
            self._masks[sliding_window] = visible
        return self._masks[sliding_window]


def _add_spans(
    visible: torch.Tensor, spans: tuple[BidirectionalSpan, ...], queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Make the tokens of each span visible to each other."""
    for span in spans:
        visible = visible | (_is_inside(span, queries) & _is_inside(span, keys))
    return visible


def _is_inside(span: BidirectionalSpan, positions: torch.Tensor) -> torch.Tensor:
    return (positions >= span.start) & (positions < span.end)


class SDPAMetadata(AttentionMetadata):
    """Metadata of `SDPABackend`.

    Attributes:
        write_slots: `[num_tokens]`, the row of the cache that each token's key and value are written to.
        groups: the sequences, each in one group.
    """

    def __init__(self, kv_cache: KVCache, spans: list[Span]) -> None:
        device = kv_cache.keys.device
        super().__init__(spans, device)
        self._kv_cache = kv_cache
        slots = [_slots(span, kv_cache.block_size) for span in spans]
        written = [found[span.start :] for found, span in zip(slots, spans, strict=True)]
        self.write_slots = torch.cat(written).to(device)
        first_rows = [*itertools.accumulate((span.num_tokens for span in spans), initial=0)]
        self.groups = [
            QueryGroup(
                torch.tensor([row for i in found for row in range(first_rows[i], first_rows[i + 1])], device=device),
                pad_sequence([slots[i] for i in found], batch_first=True).to(device),
                torch.tensor([list(range(spans[i].start, spans[i].end)) for i in found], device=device),
                is_even=len({spans[i].end for i in found}) == 1,
                bidirectional_spans=spans[found[0]].bidirectional_spans,
            )
            for found in _group(spans)
        ]

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
        """See `AttentionMetadata.attend`."""
        keys, values = self._kv_cache.keys[layer], self._kv_cache.values[layer]
        keys[self.write_slots] = key
        values[self.write_slots] = value
        output = query.new_empty(*query.shape[:2], values.shape[-1])
        for group in self.groups:
            num_seqs, query_len = group.positions.shape
            attended = attend(
                query[group.rows].view(num_seqs, query_len, *query.shape[1:]).transpose(1, 2),
                _gather(keys, group.slots),
                _gather(values, group.slots),
                group.mask(sliding_window),
                scaling=scaling,
                softcap=softcap,
            )
            output[group.rows] = attended.transpose(1, 2).flatten(0, 1)
        return output


def _group(spans: list[Span]) -> list[list[int]]:
    """Group sequences with one token whose contexts differ by less than a factor of two; the others stay alone."""
    members: dict[object, list[int]] = defaultdict(list)
    for index, span in enumerate(spans):
        is_alone = span.num_tokens > 1 or span.bidirectional_spans
        members[index if is_alone else f"2^{span.end.bit_length()}"].append(index)
    return list(members.values())


def _slots(span: Span, block_size: int) -> torch.Tensor:
    """Return the rows of the cache for a sequence up to the end of this step, `[end]`."""
    blocks = torch.tensor(span.block_table)[:, None] * block_size + torch.arange(block_size)
    return blocks.flatten()[: span.end]


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
    """Attend from the tokens of a group to their contexts; see `AttentionMetadata.attend` for the options.

    Args:
        query: `[num_seqs, num_heads, query_len, head_dim]`, also the shape of the output.
        key, value: `[num_seqs, num_kv_heads, context_len, head_dim]`.
        mask: see `QueryGroup.mask`.
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
