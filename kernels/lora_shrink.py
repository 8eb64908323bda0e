"""Triton kernel of the first half of LoRA: rows times lora_A, down to the rank of each row's adapter."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import os

import torch
import triton
import triton.language as tl

from mmlora.kernels.segments import BLOCK_M

BLOCK_R = 16
BLOCK_K = 128

PART_SIZE, MAX_PARTS = 512, 8
"""Programs side by side sum parts of in_features: of at most this many, unless that were more than so many parts."""

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the type in which `tl.dot` takes its operands: their own, but Triton's interpreter has no bf16 dot."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return tl.float32 if is_interpreted and dtype == torch.bfloat16 else TRITON_DTYPES[dtype]


@triton.jit
def lora_shrink_kernel(
    x_ptr,
    h_ptr,
    table_ptr,
    tiles_ptr,
    in_features,
    part_size,
    stride_x,
    stride_h,
    stride_part,
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
    # One program sums one part of in_features and stores it; `lora_expand` adds the parts up in order, without atomics.
    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, part_size, BLOCK_K):
        features = tl.program_id(2) * part_size + k + tl.arange(0, BLOCK_K)
        is_feature = features < in_features
        x = tl.load(x_rows + features[None, :], mask=is_row[:, None] & is_feature[None, :], other=0.0)
        a = tl.load(a_rows + features[:, None], mask=is_feature[:, None] & is_rank[None, :], other=0.0)
        h = tl.dot(x.to(DTYPE).to(DOT_DTYPE), a.to(DOT_DTYPE), h, input_precision="ieee")
    h_rows = h_ptr + rows.to(tl.int64)[:, None] * stride_h
    h_block = h_rows + tl.program_id(2) * stride_part + ranks[None, :]
    tl.store(h_block, h, mask=is_row[:, None] & is_rank[None, :])


def lora_shrink(
    x: torch.Tensor, table: torch.Tensor, tiles: torch.Tensor, max_rank: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return h whose parts add up to `h[rows of a tile, :, :r].sum(1) = x[rows] @ lora_A[slot].T`, in fp32.

    How many parts there are depends on in_features alone. The rest of h is uninitialised.

    Args:
        x: `[num_rows, in_features]` with contiguous rows.
        table: `[max_loras, 3] int64`, see `SlotWeights.table`.
        tiles: `[num_tiles, 3] int32`, see `RowSegments.tiles`.
        max_rank: at least the rank of every slot; columns of h.
        dtype: of the lora_A that the table points to.

    Returns:
        h: `[num_rows, num_parts, max_rank] fp32`.
    """
    num_rows, in_features = x.shape
    num_parts = min(triton.cdiv(in_features, PART_SIZE), MAX_PARTS)
    part_size = triton.cdiv(triton.cdiv(in_features, num_parts), BLOCK_K) * BLOCK_K
    h = torch.empty(num_rows, num_parts, max_rank, dtype=torch.float32, device=x.device)
    lora_shrink_kernel[(tiles.shape[0], triton.cdiv(max_rank, BLOCK_R), num_parts)](
        x,
        h,
        table,
        tiles,
        in_features,
        part_size,
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
