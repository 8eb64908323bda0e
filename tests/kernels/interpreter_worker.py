"""Run kernel cases in a subprocess, since Triton decides at import whether it interprets or compiles kernels.

Reads one case per line from stdin as JSON, and writes a line of measurements as JSON. The first argument is the device.
"""

import json
import sys

import torch

from mmlora.kernels import ops
from mmlora.kernels.lora_expand import lora_expand
from mmlora.kernels.lora_shrink import lora_shrink
from mmlora.kernels.slot_weights import SlotWeights
from tests.kernels.reference import lora_apply_reference, lora_expand_reference, lora_shrink_reference


def run_case(case: dict, device: torch.device) -> dict:
    """Return the largest differences between kernels and references, and whether bitwise properties hold."""
    torch.manual_seed(case["seed"])
    dtype = getattr(torch, case["dtype"])
    in_features, out_features, ranks = case["in"], case["out"], case["ranks"]
    segments = [tuple(segment) for segment in case["segments"]]
    weights = SlotWeights(len(ranks), device)
    for slot, rank in enumerate(ranks):
        if rank:
            lora_A = torch.randn(rank, in_features) / in_features**0.5
            lora_B = torch.randn(out_features, rank) / rank**0.5
            weights.set(slot, lora_A.to(dtype), lora_B.to(dtype), 0.5 + slot)
    num_rows = segments[-1][1]
    x = torch.randn(num_rows, in_features).to(device, dtype)
    y = torch.randn(num_rows, out_features).to(device, dtype)
    rows = ops.row_segments(segments, device)

    def apply(rows: ops.RowSegments) -> torch.Tensor:
        result = y.clone()
        ops.lora_apply(result, x, weights, rows)
        return result

    applied, expected = apply(rows), y.clone()
    lora_apply_reference(expected, x, weights.lora_A, weights.lora_B, weights.scaling, segments)
    buffer = torch.full((rows.tiles.shape[0] + 3, 3), 7, dtype=torch.int32, device=device)
    h_expected = lora_shrink_reference(x, weights.lora_A, segments, max(ranks))
    h = lora_shrink(x, weights.table, rows.tiles, max(ranks), dtype).sum(1)
    h_error, expanded, y_expected = 0.0, y.clone(), y.clone()
    for start, end, slot in rows.segments:
        if end > start and ranks[slot]:
            difference = h[start:end, : ranks[slot]] - h_expected[start:end, : ranks[slot]]
            h_error = max(h_error, difference.abs().max().item())
    lora_expand(expanded, h_expected[:, None], weights.table, weights.scaling_table, rows.tiles, dtype)
    lora_expand_reference(y_expected, h_expected, weights.lora_B, weights.scaling, segments)
    without_lora = torch.ones(num_rows, dtype=torch.bool)
    alone_equal = True
    for start, end, slot in rows.segments:
        without_lora[start:end] = ranks[slot] == 0
        others_base = [(0, start, -1), (start, end, slot), (end, num_rows, -1)]
        alone = apply(ops.row_segments(others_base, device))
        alone_equal &= torch.equal(alone[start:end], applied[start:end])
    return {
        "shrink": h_error,
        "expand": (expanded.float() - y_expected.float()).abs().max().item(),
        "apply": (applied.float() - expected.float()).abs().max().item(),
        "unequal": (applied != expected).float().mean().item(),
        "change": (expected.float() - y.float()).abs().max().item(),
        "base_rows_untouched": torch.equal(applied[without_lora.to(device)], y[without_lora.to(device)]),
        "alone_equal": alone_equal,
        "padded_equal": torch.equal(apply(ops.row_segments(segments, device, buffer)), applied),
        "repeat_equal": torch.equal(apply(rows), applied),
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run_case(json.loads(line), torch.device(sys.argv[1]))), flush=True)
