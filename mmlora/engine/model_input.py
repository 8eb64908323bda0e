"""`Batch`: the tokens of a step, laid one after the other, and what the model must know of each."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mmlora.attention.paged import AttentionMetadata, KVCache, Span
from mmlora.engine.scheduler import ScheduledSequence
from mmlora.kernels.segments import BASE_SLOT, Segment


@dataclass(frozen=True)
class Batch:
    """The flattened inputs of one forward; rows are grouped by LoRA slot."""

    items: list[ScheduledSequence]
    input_ids: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [1, num_tokens], or [3, 1, num_tokens]: time, height, width
    attention: AttentionMetadata
    segments: list[Segment] | None  # over all rows, None without adapters
    starts: list[int]  # first row of each item
    own_slot: int | None  # the slot of all rows, for an adapter that needs a pass of its own

    @classmethod
    def build(
        cls, items: Iterable[ScheduledSequence], kv_cache: KVCache, num_position_rows: int, own_slot: int | None
    ) -> "Batch":
        """Lay out a step.

        Args:
            items: what the scheduler chose.
            kv_cache: of the engine.
            num_position_rows: 1, or 3 for a model whose pictures have time, height and width.
            own_slot: see `Batch`.
        """
        items = sorted(items, key=_slot_of)
        token_ids: list[int] = []
        positions: list[list[int]] = [[] for _ in range(num_position_rows)]
        starts: list[int] = []
        for item in items:
            starts.append(len(token_ids))
            token_ids += item.seq.token_ids[item.start : item.end]
            for index, row in enumerate(positions):
                row += item.seq.positions(item.start, item.end, index)
        segments = _segments(run for item in items for run in _runs_of(item))
        device = kv_cache.keys.device
        return cls(
            items,
            torch.tensor(token_ids, device=device),
            torch.tensor(positions if num_position_rows == 1 else [[row] for row in positions], device=device),
            AttentionMetadata.build(kv_cache, [_span(item) for item in items]),
            segments if any(slot != BASE_SLOT for _, _, slot in segments) else None,
            starts,
            own_slot,
        )

    @property
    def logit_rows(self) -> list[int]:
        """The rows whose logits are needed, ascending."""
        return [row for item, start in zip(self.items, self.starts, strict=True) for row in _logit_rows(item, start)]

    def segments_of(self, rows: list[int]) -> list[Segment] | None:
        """Lay the slots of some rows, ascending, one after the other; None without adapters."""
        if self.segments is None:
            return None
        return _segments((1, slot) for slot in _slots_of_rows(rows, self.segments))


def prompt_positions(item: ScheduledSequence) -> range:
    """Return the positions of a chunk whose logits predict a token of the prompt."""
    return range(item.start, min(item.end, item.seq.num_prompt_tokens - 1))


def _span(item: ScheduledSequence) -> Span:
    seq, start, end = item.seq, item.start, item.end
    return Span(seq.block_table, start, end, seq.is_long, seq.bidirectional_spans_between(start, end))


def _slot_of(item: ScheduledSequence) -> int:
    return BASE_SLOT if item.seq.slot is None else item.seq.slot


def _runs_of(item: ScheduledSequence) -> list[tuple[int, int]]:
    """How many of the tokens computed take which slot: the base model's for those before the adapter holds."""
    num_base = min(max(item.seq.adapter_start - item.start, 0), item.num_tokens)
    return [(num_base, BASE_SLOT), (item.num_tokens - num_base, _slot_of(item))]


def _segments(runs: Iterable[tuple[int, int]]) -> list[Segment]:
    """Lay runs `(num_rows, slot)` one after the other, neighbours of one slot joined."""
    segments: list[Segment] = []
    end = 0
    for num_rows, slot in runs:
        start, end = end, end + num_rows
        if num_rows == 0:
            continue
        if segments and segments[-1][2] == slot:
            segments[-1] = (segments[-1][0], end, slot)
        else:
            segments.append((start, end, slot))
    return segments


def _slots_of_rows(rows: list[int], segments: list[Segment]) -> list[int]:
    """The slot of each of some rows, ascending."""
    slots, remaining = [], iter(segments)
    segment = next(remaining)
    for row in rows:
        while row >= segment[1]:
            segment = next(remaining)
        slots.append(segment[2])
    return slots


def _logit_rows(item: ScheduledSequence, first_row: int) -> list[int]:
    rows = []
    if item.seq.wants_prompt_logprobs:
        rows = [first_row + position - item.start for position in prompt_positions(item)]
    if item.is_sampled:
        rows.append(first_row + item.num_tokens - 1)
    return rows
