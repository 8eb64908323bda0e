"""Low-rank changes of single experts, fused into one change of the parameter that has the weights of all experts."""

from collections.abc import Mapping

import torch

from mmlora.errors import AdapterMismatch
from mmlora.lora.loading.conversions import Target
from mmlora.lora.weights import LoRAWeights


def fuse_experts(pieces: Mapping[Target, LoRAWeights], shape: torch.Size) -> LoRAWeights:
    """Return the change of a fused parameter.

    The ranks of the parts of an expert, such as gate and up, follow one another: lora_A is stacked and lora_B is
    block-diagonal. Experts and parts without a change, and ranks below the largest, are zeros. Scalings that differ are
    folded into lora_B. DoRA magnitudes of rows without a change are NaN.

    Args:
        pieces: the changes, each with the place of its weight; at least one.
        shape: of the parameter, `[num_experts, out_features, in_features]`.

    Raises:
        AdapterMismatch: a folded scaling overflows the dtype of the matrices.
    """
    num_experts, out_features, in_features = shape
    first = next(iter(pieces.values()))
    starts, rank = _rank_offsets(pieces)
    is_uniform = len({piece.scaling for piece in pieces.values()}) == 1
    lora_A = first.lora_A.new_zeros(num_experts, rank, in_features)
    lora_B = first.lora_B.new_zeros(out_features, rank, num_experts)
    magnitude = None if first.magnitude is None else first.magnitude.new_full((num_experts, out_features), torch.nan)
    for target, piece in pieces.items():
        assert target.expert is not None
        height = out_features // target.num_parts
        rows = slice(target.part * height, (target.part + 1) * height)
        ranks = slice(starts[target.part], starts[target.part] + piece.lora_A.shape[0])
        lora_A[target.expert, ranks] = piece.lora_A
        lora_B[rows, ranks, target.expert] = piece.lora_B if is_uniform else piece.lora_B.float() * piece.scaling
        if magnitude is not None and piece.magnitude is not None:
            magnitude[target.expert, rows] = piece.magnitude
    if not torch.isfinite(lora_B).all():
        raise AdapterMismatch(f"lora_B of an expert of {target.module} overflows {lora_B.dtype} with its scaling")
    scaling = first.scaling if is_uniform else 1.0
    return LoRAWeights(lora_A.flatten(0, 1), lora_B.flatten(1), scaling, None, magnitude, num_experts)


def _rank_offsets(pieces: Mapping[Target, LoRAWeights]) -> tuple[dict[int, int], int]:
    """Return the first rank of each part that has a change, and the rank of all parts together."""
    largest: dict[int, int] = {}
    for target, piece in pieces.items():
        largest[target.part] = max(largest.get(target.part, 0), piece.lora_A.shape[0])
    starts, rank = {}, 0
    for part in sorted(largest):
        starts[part] = rank
        rank += largest[part]
    return starts, rank
