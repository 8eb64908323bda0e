"""`ModelInput`: everything that the model needs for one forward, as plain data.

It refers to no live sequence, so it can be pickled, sent to another process, or copied into static buffers.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mmlora.attention.backend import Span
from mmlora.engine.scheduler import ScheduledSequence
from mmlora.inputs.engine_input import MediaInput
from mmlora.kernels.ops import BASE_SLOT, Segment


@dataclass(frozen=True, eq=False)
class MediaRows:
    """Embeddings of a media item that replace those of its placeholders.

    Attributes:
        rows: `[num_rows]`, rows of the flattened batch.
        embeds: `[num_rows, hidden_size]`, or more columns with features for deeper layers.
    """

    rows: torch.Tensor
    embeds: torch.Tensor


@dataclass(frozen=True, eq=False)
class ModelInput:
    """The flattened inputs of one forward; sequences are ordered by LoRA slot. Tensors are on the CPU, media excepted.

    Attributes:
        token_ids: `[num_tokens]`.
        positions: `[1, num_tokens]`, or `[3, 1, num_tokens]` for multimodal RoPE: time, height, width.
        spans: the part of each sequence that is computed, in the order of the rows.
        logit_rows: `[num_logit_rows]`, the rows whose logits are needed, ascending.
        media: embeddings for placeholders.
        segments: LoRA slots of all rows; None where all rows are the base model's.
        logit_segments: the same for `logit_rows`.
        uniform_slot: slot of all rows, also those inside towers and routers, for an adapter that needs a forward
            without other sequences; `segments` is then ignored.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    spans: tuple[Span, ...]
    logit_rows: torch.Tensor
    media: tuple[MediaRows, ...] = ()
    segments: tuple[Segment, ...] | None = None
    logit_segments: tuple[Segment, ...] | None = None
    uniform_slot: int | None = None


def build_model_input(
    items: list[ScheduledSequence], num_position_rows: int = 1, uniform_slot: int | None = None
) -> ModelInput:
    """Build the flattened inputs of a forward.

    Args:
        items: the scheduled sequences, in the order of `group_by_slot`; their media are encoded.
        num_position_rows: 1, or 3 for multimodal RoPE.
        uniform_slot: see `ModelInput`.
    """
    token_ids: list[int] = []
    positions: list[list[int]] = [[] for _ in range(num_position_rows)]
    logit_rows: list[int] = []
    media: list[MediaRows] = []
    for item in items:
        offset = len(token_ids) - item.start
        token_ids += item.seq.token_ids[item.start : item.end]
        for index, row in enumerate(positions):
            row += item.seq.positions(item.start, item.end, index)
        logit_rows += [offset + position for position in logit_positions(item)]
        media += _media_rows(item, offset)
    segments = _join(run for item in items for run in _slot_runs(item))
    has_adapters = any(slot != BASE_SLOT for _, _, slot in segments)
    return ModelInput(
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(positions if num_position_rows == 1 else [[row] for row in positions]),
        spans=tuple(_span(item) for item in items),
        logit_rows=torch.tensor(logit_rows, dtype=torch.long),
        media=tuple(media),
        segments=segments if has_adapters else None,
        logit_segments=_segments_of(logit_rows, segments) if has_adapters else None,
        uniform_slot=uniform_slot,
    )


def group_by_slot(items: list[ScheduledSequence]) -> list[ScheduledSequence]:
    """Sort the sequences of a step by LoRA slot, the base model first, so that each slot has one segment of rows."""
    return sorted(items, key=_slot_of)


def logit_positions(item: ScheduledSequence) -> list[int]:
    """Return the positions of a sequence whose logits are needed: for prompt log probabilities, and for sampling."""
    positions = [*prompt_logprob_positions(item)]
    if item.is_sampled:
        positions.append(item.end - 1)
    return positions


def prompt_logprob_positions(item: ScheduledSequence) -> range:
    """Return the positions of a chunk whose logits predict a prompt token; empty if those are not wanted."""
    end = min(item.end, item.seq.num_prompt_tokens - 1) if item.seq.wants_prompt_logprobs else item.start
    return range(item.start, end)


def _span(item: ScheduledSequence) -> Span:
    seq, start, end = item.seq, item.start, item.end
    bidirectional_spans = seq.bidirectional_spans_between(start, end)
    return Span(tuple(seq.block_table), start, end, seq.uses_long_rope_factors, bidirectional_spans)


def _media_rows(item: ScheduledSequence, offset: int) -> list[MediaRows]:
    """Return the media embeddings of a chunk; `offset` is the row of the sequence's position 0."""
    found = []
    for index, media in item.media:
        embeds, positions = _embeds_between(item.seq.media_embeds[index], media, item.start, item.end)
        found.append(MediaRows(positions + offset, embeds))
    return found


def _embeds_between(embeds: torch.Tensor, media: MediaInput, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings of a media item for positions `start … end − 1` of the prompt, and these positions."""
    if media.media.embed_positions is None:
        start, end = max(media.start, start), min(media.end, end)
        return embeds[start - media.start : end - media.start], torch.arange(start, end)
    positions = torch.tensor(media.media.embed_positions) + media.start
    is_inside = (positions >= start) & (positions < end)
    return embeds[is_inside.to(embeds.device)], positions[is_inside]


def _slot_of(item: ScheduledSequence) -> int:
    return BASE_SLOT if item.seq.slot is None else item.seq.slot


def _slot_runs(item: ScheduledSequence) -> list[tuple[int, int]]:
    """Return runs `(num_tokens, slot)`: tokens before the adapter's start are the base model's."""
    num_base = min(max(item.seq.adapter_start - item.start, 0), item.num_tokens)
    return [(num_base, BASE_SLOT), (item.num_tokens - num_base, _slot_of(item))]


def _join(runs: Iterable[tuple[int, int]]) -> tuple[Segment, ...]:
    """Concatenate runs `(num_rows, slot)` to segments, and merge neighbours with the same slot."""
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
    return tuple(segments)


def _segments_of(rows: list[int], segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Return the segments of the given rows, which ascend, after these are concatenated."""
    slots, remaining = [], iter(segments)
    segment = next(remaining)
    for row in rows:
        while row >= segment[1]:
            segment = next(remaining)
        slots.append(segment[2])
    return _join((1, slot) for slot in slots)
