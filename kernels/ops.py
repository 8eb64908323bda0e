"""Public interface of the LoRA kernels: Triton on CUDA, torch on the CPU. Triton is imported only where it runs."""

import os
from collections.abc import Sequence

import torch

from mmlora.kernels.segments import RowSegments, Segment, adapter_segments, build_tiles
from mmlora.kernels.slot_weights import SlotWeights


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
