"""Semantic scores of mask logits in Triton: the full-size masks of queries are never written.

A program reads the stride-4 logits around a stretch of one row of pixels, and adds up class times
mask probability over the queries. 100 queries of 640 x 2048 pixels take 26 MB of logits to read and
100 MB of scores to write (19 classes), where the enlarged masks alone took 524 MB, four times over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 128
"""Pixels of a program: the sums of 32 classes take 16 registers of each of 256 threads."""

WARPS = 8

QUERIES = 16
"""Queries in one product, the least that Triton multiplies."""


@triton.jit
def _sources(at, length, scale):
    """Returns where pixels lie among cells: the cell before, the cell after, the way between."""
    place = tl.maximum((at.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    place = tl.minimum(place, length - 1.0)
    cell = tl.floor(place).to(tl.int32)
    return cell, tl.minimum(cell + 1, length - 1), place - cell.to(tl.float32)


@triton.jit(do_not_specialize=["height", "width", "rows", "columns"])
def semantic_rows(
    masks,
    probs,
    out,
    height,
    width,
    rows,
    columns,
    scale_y,
    scale_x,
    NUM_QUERIES: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Writes ``out`` (classes, rows, columns) of a stretch of a row, of all classes."""
    y = tl.program_id(1)
    x = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    category = tl.arange(0, BLOCK_CLASSES)
    top, bottom, down = _sources(y, height, scale_y)
    left, other, right = _sources(x, width, scale_x)
    right = right[None, :]
    scores = tl.zeros((BLOCK_CLASSES, BLOCK_PIXELS), tl.float32)
    for start in range(0, NUM_QUERIES, BLOCK_QUERIES):
        query = start + tl.arange(0, BLOCK_QUERIES)
        known = query < NUM_QUERIES
        inside = known[:, None] & (x < columns)[None, :]
        upper = masks + ((query * height + top) * width)[:, None]
        lower = masks + ((query * height + bottom) * width)[:, None]
        above = tl.load(upper + left[None, :], inside, other=0.0).to(tl.float32) * (1.0 - right)
        above += tl.load(upper + other[None, :], inside, other=0.0).to(tl.float32) * right
        below = tl.load(lower + left[None, :], inside, other=0.0).to(tl.float32) * (1.0 - right)
        below += tl.load(lower + other[None, :], inside, other=0.0).to(tl.float32) * right
        logits = above * (1.0 - down) + below * down
        at = query[None, :] * NUM_CLASSES + category[:, None]
        present = known[None, :] & (category < NUM_CLASSES)[:, None]
        share = tl.load(probs + at, present, other=0.0)
        # float32 whatever products may do elsewhere: it is a small part of the time
        scores += tl.dot(share, 1.0 / (1.0 + tl.exp(-logits)), input_precision="ieee")
    at = (category * rows + y)[:, None].to(tl.int64) * columns + x[None, :]
    present = (category < NUM_CLASSES)[:, None] & (x < columns)[None, :]
    tl.store(out + at, scores, present)


def semantic_scores(
    class_logits: Tensor, mask_logits: Tensor, padded: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Returns each class's score at each pixel, of masks that are enlarged on the way.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w) of the padded image.
        padded: its height and width, which the masks are enlarged to bilinearly.
        size: height and width of the image without padding, whose scores are returned.

    Returns:
        (K, height, width) float32.
    """
    probs = class_logits.float().softmax(-1)[:, :-1].contiguous()
    mask_logits = mask_logits.contiguous()
    queries, height, width = mask_logits.shape
    classes, (rows, columns) = probs.shape[1], size
    out = probs.new_empty((classes, rows, columns), dtype=torch.float32)
    semantic_rows[(triton.cdiv(columns, PIXELS), rows)](
        mask_logits,
        probs,
        out,
        height,
        width,
        rows,
        columns,
        height / padded[0],
        width / padded[1],
        NUM_QUERIES=queries,
        NUM_CLASSES=classes,
        BLOCK_QUERIES=QUERIES,
        BLOCK_CLASSES=max(16, triton.next_power_of_2(classes)),
        BLOCK_PIXELS=PIXELS,
        num_warps=WARPS,
    )
    return out
