"""Attention masks of queries in Triton, from the mask logits, in the dtype of the attention.

PyTorch takes five operations for a boolean mask, and fused attention one or two more to turn it
into what it adds: about 15 bytes an element are read and written, here 6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a row that a program works on at once."""

WARPS = 4

ALIGNED = 16
"""Fused attention copies a mask unless its rows start at multiples of this."""


@triton.jit(do_not_specialize=["columns", "stride"])
def mask_rows(logits, bias, columns, stride, BLOCK_COLUMNS: tl.constexpr):
    """Writes 0 where a row's logits are not negative, or everywhere if all are; else -inf."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)
    found = tl.zeros((BLOCK_COLUMNS,), tl.int32)
    for start in range(0, columns, BLOCK_COLUMNS):
        at = start + column
        value = tl.load(logits + row * columns + at, at < columns, other=-1.0).to(tl.float32)
        found = tl.maximum(found, (value >= 0).to(tl.int32))
    empty = tl.max(found, 0) == 0
    for start in range(0, columns, BLOCK_COLUMNS):
        at = start + column
        value = tl.load(logits + row * columns + at, at < columns, other=-1.0).to(tl.float32)
        out = tl.where((value >= 0) | empty, 0.0, float("-inf"))
        tl.store(bias + row * stride + at, out.to(bias.dtype.element_ty), at < columns)


def attention_bias(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what attention adds to its own logits: 0 inside a query's mask, else -inf.

    ``logits`` (B, Q, S) are negative outside a mask; an empty mask allows everything. The result
    (B, Q, S) has rows that start at multiples of 16 elements.
    """
    logits = logits.contiguous()
    batch, queries, columns = logits.shape
    stride = triton.cdiv(columns, ALIGNED) * ALIGNED
    bias = logits.new_empty((batch, queries, stride), dtype=dtype)
    block = min(BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device_of(logits):
        mask_rows[(batch * queries,)](
            logits, bias, columns, stride, BLOCK_COLUMNS=block, num_warps=WARPS
        )
    return bias[:, :, :columns]
