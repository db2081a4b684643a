"""Masks of queries in Triton: what attention adds for them, and their probabilities at full size.

PyTorch takes five operations for a boolean attention mask, and fused attention one or two more to
turn it into what it adds: about 15 bytes an element are read and written, here 6. For probabilities
in bfloat16 it takes three, an enlarged float32 map, its sigmoid and a cast: 18 bytes, here 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a row that a program works on at once."""

WARPS = 4

ROWS, COLUMNS, PIXEL_WARPS = 8, 256, 4
"""Tile of a mask at full size: rows are 512 bytes in bfloat16, and a thread has 16 pixels."""

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


@triton.jit
def _source(index, scale, size):
    """Returns the two neighbours of places in an enlarged axis, and the share of the second one."""
    place = tl.maximum((index.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(place.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), place - low.to(tl.float32)


@triton.jit
def enlarged_probabilities(
    logits,
    out,
    height,
    width,
    out_height,
    out_width,
    vertical,
    horizontal,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the sigmoid of bilinearly enlarged logits; pixel centres lie at halves.

    ``vertical`` and ``horizontal`` are the source's size over the result's.
    """
    across = tl.cdiv(out_width, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    top, bottom, down = _source(row, vertical, height)
    left, right, along = _source(column, horizontal, width)
    source = logits + tl.program_id(1).to(tl.int64) * height * width
    inside = (row < out_height)[:, None] & (column < out_width)[None, :]
    above = (source + top * width)[:, None]
    below = (source + bottom * width)[:, None]
    along = along[None, :]
    first = tl.load(above + left[None, :], inside, other=0.0).to(tl.float32) * (1.0 - along)
    first += tl.load(above + right[None, :], inside, other=0.0).to(tl.float32) * along
    second = tl.load(below + left[None, :], inside, other=0.0).to(tl.float32) * (1.0 - along)
    second += tl.load(below + right[None, :], inside, other=0.0).to(tl.float32) * along
    value = tl.sigmoid(first * (1.0 - down)[:, None] + second * down[:, None])
    target = out + tl.program_id(1).to(tl.int64) * out_height * out_width
    place = row[:, None] * out_width + column[None, :]
    tl.store(target + place, value.to(out.dtype.element_ty), inside)


def mask_probabilities(
    logits: Tensor,
    size: tuple[int, int],
    dtype: torch.dtype,
    *,
    rows: int = ROWS,
    columns: int = COLUMNS,
    warps: int = PIXEL_WARPS,
) -> Tensor:
    """Returns the sigmoid of mask logits that are enlarged to a size; without a gradient.

    Args:
        logits: (Q, h, w) floating, less than 2**31 elements a mask in either size.
        size: (H, W); between pixels logits are interpolated bilinearly, as ``F.interpolate`` does
            with ``align_corners=False``.
        dtype: of the result; it is computed in float32.
        rows, columns, warps: how the kernel is started.

    Returns:
        Probabilities (Q, H, W).
    """
    logits = logits.detach().contiguous()
    (queries, height, width), (out_height, out_width) = logits.shape, size
    out = logits.new_empty((queries, *size), dtype=dtype)
    tiles = triton.cdiv(out_height, rows) * triton.cdiv(out_width, columns)
    with torch.cuda.device_of(logits):
        enlarged_probabilities[(tiles, queries)](
            logits,
            out,
            height,
            width,
            out_height,
            out_width,
            height / out_height,
            width / out_width,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
        )
    return out
