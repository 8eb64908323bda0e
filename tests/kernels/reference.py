"""Naive PyTorch references of the LoRA kernels, which define what the kernels compute."""

from collections.abc import Sequence

import torch

from mmlora.kernels.ops import Segment


def lora_shrink_reference(
    x: torch.Tensor, lora_A: Sequence[torch.Tensor | None], segments: Sequence[Segment], max_rank: int
) -> torch.Tensor:
    """Project rows down to the rank of their adapter.

    **Semantics**: `h[start:end, :r] = x[start:end] @ lora_A[slot].T` for each segment `(start, end, slot)`, in fp32;
    everything else of h is undefined (0 here).

    Args:
        x: `[num_rows, in_features]`.
        lora_A: per slot `[r, in_features]` or None.
        segments: `(start, end, slot)`, slot −1 for the base.
        max_rank: columns of h.

    Returns:
        h: `[num_rows, max_rank] fp32`.
    """
    h = torch.zeros(x.shape[0], max_rank, dtype=torch.float32, device=x.device)
    for start, end, slot in segments:
        weight = lora_A[slot] if slot >= 0 else None
        if weight is not None:
            h[start:end, : weight.shape[0]] = x[start:end].float() @ weight.float().T
    return h


def lora_expand_reference(
    y: torch.Tensor,
    h: torch.Tensor,
    lora_B: Sequence[torch.Tensor | None],
    scaling: Sequence[float],
    segments: Sequence[Segment],
) -> None:
    """Project rows up from the rank of their adapter and add them to y in place.

    **Semantics**: `y[start:end] += scaling[slot] * h[start:end, :r] @ lora_B[slot].T` for each segment, in fp32,
    rounded once.

    Args:
        y: `[num_rows, out_features]`, changed in place.
        h: `[num_rows, max_rank] fp32`.
        lora_B: per slot `[out_features, r]` or None.
        scaling: per slot.
        segments: `(start, end, slot)`, slot −1 for the base.
    """
    for start, end, slot in segments:
        weight = lora_B[slot] if slot >= 0 else None
        if weight is not None:
            delta = scaling[slot] * h[start:end, : weight.shape[1]] @ weight.float().T
            y[start:end] = (y[start:end].float() + delta).to(y.dtype)


def lora_apply_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Sequence[torch.Tensor | None],
    lora_B: Sequence[torch.Tensor | None],
    scaling: Sequence[float],
    segments: Sequence[Segment],
) -> None:
    """Add each adapter's contribution to its rows.

    **Semantics**: `y[start:end] += scaling[slot] * (x[start:end] @ lora_A[slot].T) @ lora_B[slot].T`.
    """
    max_rank = max((weight.shape[0] for weight in lora_A if weight is not None), default=0)
    lora_expand_reference(y, lora_shrink_reference(x, lora_A, segments, max_rank), lora_B, scaling, segments)
