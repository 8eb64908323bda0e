"""Triton kernel of the first half of LoRA: multiplies rows by lora_A, down to the rank of each row's adapter."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import os

import torch
import triton
import triton.language as tl

from mmlora.kernels.ops import BLOCK_M

BLOCK_R = 16  # of lora_expand, too
BLOCK_K = 128

SPLIT_SIZE, MAX_SPLITS = 512, 8
"""Split-K: a program sums `SPLIT_SIZE` features, or more where that would make more than `MAX_SPLITS` splits."""

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of the operands of `tl.dot`: fp32 for bf16 in Triton's interpreter, which has no bf16 dot."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return tl.float32 if is_interpreted and dtype == torch.bfloat16 else TRITON_DTYPES[dtype]


@triton.jit
def lora_shrink_kernel(
    x_ptr,
    h_ptr,
    table_ptr,
    tiles_ptr,
    in_features,
    split_size,
    stride_x,
    stride_h,
    stride_split,
    DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tiles_ptr + tl.program_id(0) * 3
    slot = tl.load(tile + 2)
    if slot < 0:
        return
    entry = table_ptr + slot * 3
    rank = tl.load(entry + 2).to(tl.int32)
    if tl.program_id(1) * BLOCK_R >= rank:
        return
    lora_A = tl.load(entry).to(tl.pointer_type(DTYPE))
    rows = tl.load(tile) + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = rows < tl.load(tile + 1)
    is_rank = ranks < rank
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_x
    a_rows = lora_A + ranks.to(tl.int64)[None, :] * in_features
    # Each program stores the sum over one split of in_features; `lora_expand` adds them in order, without atomics.
    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, split_size, BLOCK_K):
        features = tl.program_id(2) * split_size + k + tl.arange(0, BLOCK_K)
        is_feature = features < in_features
        x = tl.load(x_rows + features[None, :], mask=is_row[:, None] & is_feature[None, :], other=0.0)
        a = tl.load(a_rows + features[:, None], mask=is_feature[:, None] & is_rank[None, :], other=0.0)
        h = tl.dot(x.to(DTYPE).to(DOT_DTYPE), a.to(DOT_DTYPE), h, input_precision="ieee")
    h_rows = h_ptr + rows.to(tl.int64)[:, None] * stride_h
    h_block = h_rows + tl.program_id(2) * stride_split + ranks[None, :]
    tl.store(h_block, h, mask=is_row[:, None] & is_rank[None, :])


def lora_shrink(
    x: torch.Tensor, table: torch.Tensor, tiles: torch.Tensor, max_rank: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return h with `h[rows of a tile, :, :r].sum(1) = x[rows] @ lora_A[slot].T`, in fp32: one partial sum per split.

    The number of splits depends on in_features alone. The rest of h is uninitialised.

    Args:
        x: `[num_rows, in_features]` with contiguous rows.
        table: `[max_loras, 3] int64`, see `SlotWeights.table`.
        tiles: `[num_tiles, 3] int32`, see `RowSegments.tiles`.
        max_rank: at least the rank of every slot; columns of h.
        dtype: of the lora_A matrices in the table.

    Returns:
        h: `[num_rows, num_splits, max_rank] fp32`.
    """
    num_rows, in_features = x.shape
    num_splits = min(triton.cdiv(in_features, SPLIT_SIZE), MAX_SPLITS)
    split_size = triton.cdiv(triton.cdiv(in_features, num_splits), BLOCK_K) * BLOCK_K
    h = torch.empty(num_rows, num_splits, max_rank, dtype=torch.float32, device=x.device)
    lora_shrink_kernel[(tiles.shape[0], triton.cdiv(max_rank, BLOCK_R), num_splits)](
        x,
        h,
        table,
        tiles,
        in_features,
        split_size,
        x.stride(0),
        h.stride(0),
        h.stride(1),
        DTYPE=TRITON_DTYPES[dtype],
        DOT_DTYPE=dot_dtype(dtype),
        BLOCK_M=BLOCK_M,
        BLOCK_R=BLOCK_R,
        BLOCK_K=BLOCK_K,
    )
    return h
