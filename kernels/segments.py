"""Assignment of rows of a forward pass to adapter slots, and the tile table that the Triton kernels read.

Both are built on the host and copied to the device at once. This module does not depend on adapters or weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK_M = 16
"""Rows of a tile. It is constant, so that the arithmetic of a row never depends on the batch."""

BASE_SLOT = -1
"""Slot number of rows without an adapter."""

Segment = tuple[int, int, int]
"""`(start, end, slot)`: rows `start … end − 1` use the adapter in `slot`, or none if it is −1."""


@dataclass(frozen=True)
class RowSegments:
    """Row segments of one forward pass.

    Attributes:
        num_rows: rows of the tensors.
        segments: non-empty segments with an adapter.
        tiles: `[num_tiles, 3] int32` on the device, `(start, end, slot)` of at most `BLOCK_M` rows each, padded with
            slot −1; None on the torch path.
    """

    num_rows: int
    segments: tuple[Segment, ...]
    tiles: torch.Tensor | None = None


def adapter_segments(segments: Sequence[Segment]) -> tuple[int, tuple[Segment, ...]]:
    """Return the number of rows and the non-empty adapter segments.

    Args:
        segments: must cover all rows in order and without gaps; base rows have slot −1.

    Raises:
        ValueError: there is a gap, an overlap or a negative length, which would apply an adapter to the wrong rows.
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
    """Return the number of tiles that suffices for any `max_num_segments` segments of `max_num_rows` rows."""
    return max_num_rows // BLOCK_M + max_num_segments


def build_tiles(segments: Sequence[Segment], device: torch.device, out: torch.Tensor | None = None) -> torch.Tensor:
    """Cut segments into tiles and copy them to the device without synchronization.

    Args:
        segments: adapter segments only.
        device: of the kernels.
        out: `[max_tiles, 3] int32`, filled in place and padded with slot −1, so that a CUDA graph captured over it
            stays valid; by default, return a new tensor of the exact size.
    """
    tiles = [
        (row, min(row + BLOCK_M, end), slot) for start, end, slot in segments for row in range(start, end, BLOCK_M)
    ]
    if out is not None:
        if len(tiles) > out.shape[0]:
            raise ValueError(f"{len(tiles)} tiles do not fit into the tile buffer of {out.shape[0]}")
        tiles += [(0, 0, BASE_SLOT)] * (out.shape[0] - len(tiles))
    host = torch.tensor(tiles, dtype=torch.int32).view(-1, 3)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True) if out is None else out.copy_(host, non_blocking=True)
