"""Public interface of the LoRA kernels: assign rows to adapter slots, and add the adapters' contributions to them.

Operations run in Triton on CUDA and in torch on the CPU; Triton is imported only where it runs. Segments of rows and
the tile table that the kernels read are built on the host, and copied to the device without synchronization.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmlora.kernels.slot_weights import SlotWeights

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


def uses_triton(device: torch.device) -> bool:
    """Return whether operations on a device run in Triton: always on CUDA, on the CPU only in its interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def row_segments(
    segments: Sequence[Segment], device: torch.device, tile_buffer: torch.Tensor | None = None
) -> RowSegments | None:
    """Prepare the segments of a forward pass for `lora_apply`; return None if no row has an adapter.

    Args:
        segments: `(start, end, slot)`, covering all rows in order; slot −1 for base rows.
        device: of the rows.
        tile_buffer: `[max_tiles, 3] int32` to fill in place (see `build_tiles`).
    """
    num_rows, adapters = adapter_segments(segments)
    if not adapters:
        return None
    tiles = build_tiles(adapters, device, tile_buffer) if uses_triton(device) else None
    return RowSegments(num_rows, adapters, tiles)


def lora_apply(y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, rows: RowSegments) -> None:
    """Add each adapter's contribution to its rows of y, in place.

    **Semantics**: `y[start:end] += scaling[slot] * (x[start:end] @ lora_A[slot].T) @ lora_B[slot].T`
    for each segment `(start, end, slot)`, summed in fp32 and rounded once; rows outside all segments do not change.

    Args:
        y: `[num_rows, out_features]` with contiguous rows.
        x: `[num_rows, in_features]`.
        weights: of the module.
        rows: of the forward pass.

    Raises:
        ValueError: the rows of y are not contiguous.
    """
    if y.stride(1) != 1:
        raise ValueError(f"y has strides {y.stride()}; its rows must be contiguous")
    if rows.tiles is not None:
        _apply_triton(y, x, weights, rows.tiles)
    else:
        _apply_torch(y, x, weights, rows.segments)


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


def _apply_torch(y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, segments: Sequence[Segment]) -> None:
    for start, end, slot in segments:
        lora_A, lora_B = weights.lora_A[slot], weights.lora_B[slot]
        if lora_A is None or lora_B is None:
            continue
        h = torch.mm(x[start:end].float(), lora_A.float().t())
        if y.dtype == torch.float32:
            y[start:end].addmm_(h, lora_B.float().t(), alpha=weights.scaling[slot])
        else:  # round once, after the sum
            total = torch.addmm(y[start:end].float(), h, lora_B.float().t(), alpha=weights.scaling[slot])
            y[start:end] = total


def _apply_triton(y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, tiles: torch.Tensor) -> None:
    from mmlora.kernels.lora_expand import lora_expand
    from mmlora.kernels.lora_shrink import lora_shrink

    max_rank = weights.max_rank
    if max_rank == 0 or tiles.shape[0] == 0:
        return
    dtype = next(lora_A.dtype for lora_A in weights.lora_A if lora_A is not None)
    h = lora_shrink(x.contiguous(), weights.table, tiles, max_rank, dtype)
    lora_expand(y, h, weights.table, weights.scaling_table, tiles, dtype)
