"""Which rows of a forward pass belong to which adapter slot: built on the host, one small copy to the device.

Owns the tile table that the Triton kernels walk; knows nothing of adapters or weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK_M = 16
"""Rows of one tile. It is the same for every batch, so the arithmetic of a row never depends on the batch."""

BASE_SLOT = -1
"""Slot number of rows that take the base model only."""

Segment = tuple[int, int, int]
"""`(start, end, slot)`: rows `start … end − 1` take the adapter in `slot`, or none when it is −1."""


@dataclass(frozen=True)
class RowSegments:
    """Row segments of one forward pass.

    Attributes:
        num_rows: rows of the tensors that these segments describe.
        segments: the segments with an adapter; base rows and empty segments are left out.
        tiles: `[num_tiles, 3] int32` on the device, `(start, end, slot)` of at most `BLOCK_M` rows each, padded with
            slot −1; None where the torch path runs.
    """

    num_rows: int
    segments: tuple[Segment, ...]
    tiles: torch.Tensor | None = None


def adapter_segments(segments: Sequence[Segment]) -> tuple[int, tuple[Segment, ...]]:
    """Return the number of rows and the non-empty adapter segments.

    Args:
        segments: cover all rows in order and without gaps; base rows have slot −1.

    Raises:
        ValueError: a gap, an overlap or a negative length, which would put an adapter on the wrong rows.
    """
    position = 0
    for start, end, slot in segments:
        if start != position or end < start or slot < BASE_SLOT:
            raise ValueError(
                f"segment {(start, end, slot)} does not continue at row {position}: "
                "segments cover all rows in order, base rows have slot -1"
            )
        position = end
    return position, tuple(segment for segment in segments if segment[1] > segment[0] and segment[2] != BASE_SLOT)


def max_tiles(max_num_rows: int, max_num_segments: int) -> int:
    """Return how many tiles suffice for any division of `max_num_rows` rows into `max_num_segments` segments."""
    return max_num_rows // BLOCK_M + max_num_segments


def build_tiles(segments: Sequence[Segment], device: torch.device, out: torch.Tensor | None = None) -> torch.Tensor:
    """Cut segments into tiles and copy them to the device without waiting for it.

    Args:
        segments: adapter segments only.
        device: where the kernels run.
        out: `[max_tiles, 3] int32`, filled and padded with slot −1 in place so that a CUDA graph captured over it
            stays valid; without it a tensor of the exact size is returned.
    """
    tiles = [
        (row, min(row + BLOCK_M, end), slot) for start, end, slot in segments for row in range(start, end, BLOCK_M)
    ]
    if out is not None:
        if len(tiles) > out.shape[0]:
            raise ValueError(f"{len(tiles)} tiles exceed the {out.shape[0]} that the tile buffer holds")
        tiles += [(0, 0, BASE_SLOT)] * (out.shape[0] - len(tiles))
    host = torch.tensor(tiles, dtype=torch.int32).view(-1, 3)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True) if out is None else out.copy_(host, non_blocking=True)
