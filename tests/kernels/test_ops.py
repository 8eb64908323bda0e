"""The dispatch, the torch path and the row segments."""

import subprocess
import sys

import pytest
import torch

from mmlora.kernels import ops
from mmlora.kernels.ops import adapter_segments, build_tiles, max_tiles
from mmlora.kernels.slot_weights import SlotWeights
from tests.kernels.reference import lora_apply_reference

CPU = torch.device("cpu")
# Both sides round once: in 16 bits a difference is a unit in the last place of y < 16, and rare.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-7, torch.bfloat16: 2**-4}


def slot_weights(in_features: int, out_features: int, ranks: list[int], dtype: torch.dtype) -> SlotWeights:
    weights = SlotWeights(len(ranks), CPU)
    for slot, rank in enumerate(ranks):
        if rank:
            lora_A = torch.randn(rank, in_features) / in_features**0.5
            lora_B = torch.randn(out_features, rank) / rank**0.5
            weights.set(slot, lora_A.to(dtype), lora_B.to(dtype), 0.5 + slot)
    return weights


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_torch_path_equals_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = slot_weights(33, 50, [7, 0, 40], dtype)
    segments = [(0, 3, -1), (3, 25, 0), (25, 25, 2), (25, 30, 1), (30, 60, 2)]
    x, y = torch.randn(60, 33).to(dtype), torch.randn(60, 50).to(dtype)
    expected = y.clone()
    lora_apply_reference(expected, x, weights.lora_A, weights.lora_B, weights.scaling, segments)
    before = y.clone()
    ops.lora_apply(y, x, weights, ops.row_segments(segments, CPU))
    assert (y.float() - expected.float()).abs().max() <= TOLERANCE[dtype]
    assert dtype == torch.float32 or (y != expected).float().mean() <= 0.03
    assert torch.equal(y[:3], before[:3]) and torch.equal(y[25:30], before[25:30])
    assert not torch.equal(y[3:25], before[3:25])


def test_torch_path_accepts_weights_of_a_wider_dtype() -> None:
    torch.manual_seed(0)
    weights = slot_weights(8, 9, [4], torch.float32)
    x, y = torch.randn(5, 8).bfloat16(), torch.randn(5, 9).bfloat16()
    expected = y.clone()
    lora_apply_reference(expected, x, weights.lora_A, weights.lora_B, weights.scaling, [(0, 5, 0)])
    ops.lora_apply(y, x, weights, ops.row_segments([(0, 5, 0)], CPU))
    assert (y.float() - expected.float()).abs().max() <= TOLERANCE[torch.bfloat16]


def test_a_row_is_bit_identical_in_any_batch() -> None:
    torch.manual_seed(0)
    weights = slot_weights(33, 50, [7, 5, 40], torch.float32)
    x, y = torch.randn(40, 33), torch.randn(40, 50)
    alone, mixed = y.clone(), y.clone()
    ops.lora_apply(alone, x, weights, ops.row_segments([(0, 10, -1), (10, 30, 0), (30, 40, -1)], CPU))
    ops.lora_apply(mixed, x, weights, ops.row_segments([(0, 10, 1), (10, 30, 0), (30, 40, 2)], CPU))
    assert torch.equal(alone[10:30], mixed[10:30])


def test_base_rows_have_no_segments() -> None:
    assert ops.row_segments([(0, 5, -1), (5, 5, 2)], CPU) is None


@pytest.mark.parametrize(
    "segments",
    [[(1, 2, 0)], [(0, 2, 0), (3, 4, 0)], [(0, 2, 0), (1, 4, 0)], [(0, 2, 0), (2, 1, 0)], [(0, 2, -2)]],
    ids=["late-start", "gap", "overlap", "negative", "no-slot"],
)
def test_segments_that_would_misplace_an_adapter_are_refused(segments: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="cover all rows in order"):
        adapter_segments(segments)


def test_tiles_never_cross_segments_and_pad_to_a_fixed_shape() -> None:
    segments = [(2, 20, 1), (20, 21, 0)]
    assert build_tiles(segments, CPU).tolist() == [[2, 18, 1], [18, 20, 1], [20, 21, 0]]
    buffer = torch.full((max_tiles(21, 2), 3), 5, dtype=torch.int32)
    assert build_tiles(segments[:1], CPU, buffer).tolist() == [[2, 18, 1], [18, 20, 1], [0, 0, -1]]
    with pytest.raises(ValueError, match="tile buffer"):
        build_tiles([(0, 100, 0)], CPU, buffer)


def test_a_cleared_slot_holds_nothing() -> None:
    weights = slot_weights(4, 4, [2, 3], torch.float32)
    weights.clear(1)
    assert weights.lora_A[1] is None and weights.table[1].tolist() == [0, 0, 0] and weights.max_rank == 2
    weights.clear(0)
    assert weights.max_rank == 0


def test_a_slot_outside_the_range_is_refused() -> None:
    with pytest.raises(IndexError, match=r"slot -1 is outside 0 … 0"):
        SlotWeights(1, CPU).set(-1, torch.ones(1, 1), torch.ones(1, 1), 1.0)


def test_the_dispatch_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import mmlora.kernels.ops"
    subprocess.run([sys.executable, "-c", code], check=True)
