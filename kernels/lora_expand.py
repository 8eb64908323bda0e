"""Triton kernel of the second half of LoRA: multiplies by lora_B, up to out_features, and adds to y."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl

from mmlora.kernels.lora_shrink import BLOCK_R, TRITON_DTYPES, dot_dtype
from mmlora.kernels.ops import BLOCK_M

BLOCK_N = 128


@triton.jit
def lora_expand_kernel(
    y_ptr,
    h_ptr,
    table_ptr,
    scaling_ptr,
    tiles_ptr,
    out_features,
    num_splits,
    stride_y,
    stride_h,
    stride_split,
    DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tiles_ptr + tl.program_id(0) * 3
    slot = tl.load(tile + 2)
    if slot < 0:
        return
    entry = table_ptr + slot * 3
    rank = tl.load(entry + 2).to(tl.int32)
    if rank == 0:
        return
    lora_B = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    rows = tl.load(tile) + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < tl.load(tile + 1)
    is_column = columns < out_features
    h_rows = h_ptr + rows.to(tl.int64)[:, None] * stride_h
    b_rows = lora_B + columns.to(tl.int64)[None, :] * rank
    delta = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in range(0, rank, BLOCK_R):
        ranks = r + tl.arange(0, BLOCK_R)
        is_rank = ranks < rank
        h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for split in range(num_splits):  # in order, so that equal rows give equal bits
            h_split = h_rows + split * stride_split
            h += tl.load(h_split + ranks[None, :], mask=is_row[:, None] & is_rank[None, :], other=0.0)
        b = tl.load(b_rows + ranks[:, None], mask=is_rank[:, None] & is_column[None, :], other=0.0)
        b = b.to(DOT_DTYPE)
        high = h.to(DTYPE)
        delta = tl.dot(high.to(DOT_DTYPE), b, delta, input_precision="ieee")
        if tl.float32 != DTYPE:  # the rounding error of h in the weights' dtype; b is already in registers
            low = (h - high.to(tl.float32)).to(DTYPE)
            delta = tl.dot(low.to(DOT_DTYPE), b, delta, input_precision="ieee")
    y_block = y_ptr + rows.to(tl.int64)[:, None] * stride_y + columns[None, :]
    is_y = is_row[:, None] & is_column[None, :]
    # Each element of y belongs to one program, so it is read and written without atomics.
    y = tl.load(y_block, mask=is_y, other=0.0).to(tl.float32) + tl.load(scaling_ptr + slot) * delta
    tl.store(y_block, y.to(y_ptr.dtype.element_ty), mask=is_y)


def lora_expand(
    y: torch.Tensor,
    h: torch.Tensor,
    table: torch.Tensor,
    scaling: torch.Tensor,
    tiles: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Add `scaling[slot] * h.sum(1)[rows of a tile, :r] @ lora_B[slot].T` to `y[rows]` in place.

    Args:
        y: `[num_rows, out_features]` with contiguous rows.
        h: `[num_rows, num_splits, max_rank] fp32` of `lora_shrink`.
        table: `[max_loras, 3] int64`, see `SlotWeights.table`.
        scaling: `[max_loras] fp32`.
        tiles: `[num_tiles, 3] int32`, see `RowSegments.tiles`.
        dtype: of the lora_B matrices in the table.
    """
    lora_expand_kernel[(tiles.shape[0], triton.cdiv(y.shape[1], BLOCK_N))](
        y,
        h,
        table,
        scaling,
        tiles,
        y.shape[1],
        h.shape[1],
        y.stride(0),
        h.stride(0),
        h.stride(1),
        DTYPE=TRITON_DTYPES[dtype],
        DOT_DTYPE=dot_dtype(dtype),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_R=BLOCK_R,
    )
