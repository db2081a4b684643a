"""Multi-scale deformable attention: one kernel forward and one backward.

Both read what the linear layers wrote, in its dtype, and work out places, softmax, bilinear samples
and their sum in registers, in float32 (float64 for float64). Per layer they move, for N = B Q M
rows of D channels and K = L P points, and S = Q:

- forward: read values (N D) and offsets and logits (3 N K), write the result (N D). Before, samples
  (N K D) were written and read, and places and weights were written and read several times in
  float32.
- backward: read those, the result and its gradient (5 numbers per channel), write the gradients of
  offsets and logits (3 N K), and add 4 N K D numbers in float32 to the gradient of the values.
  Those additions take most of the time. A sorted two-pass way without them would write and sort
  4 N K addresses first, which is more traffic than the additions.

Eight crops of 512x1024 of the full model (N = 688,128, K = 12, D = 32, bfloat16): 138 MB forward,
where samples alone were 528 MB in bfloat16 or 1,057 MB in float32, written once and read twice.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types.
from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

Shapes = tuple[tuple[int, int], ...]

FORWARD_WARPS = 4
"""Warps of a program."""
FORWARD_WIDTH = 8
"""Channels of a thread: 8 of bfloat16 are the widest load, 16 bytes."""
FORWARD_HEADS = 1
"""Heads of a program. With one, its rows are neighbouring queries, which read the same pixels."""

BACKWARD_WARPS = 1
"""One warp waits for no other, and registers allow as many warps of one program as of several."""
BACKWARD_WIDTH = 4
"""Channels of a thread: 4 of float32 are the widest addition to memory, 16 bytes."""
BACKWARD_HEADS = 4
"""Heads of a program. Additions of different heads go to different addresses."""
BACKWARD_WIDTH_BEFORE_HOPPER = 1
"""Older GPUs add number by number; threads side by side then share a transaction."""


def attend(
    values: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Attends from each query to points around its reference on every level.

    Positions, softmax and sums are float32, or float64 if the values are. Values outside of a level
    are zero. A place that is not a number makes its query's result NaN; no place reads memory
    outside of the values.

    Args:
        values: (B, S, M, D) for M heads; S is the sum of height * width over the levels.
        shapes: (height, width) of each of the L levels.
        reference: (Q, 2) normalised (x, y) of each query; it gets no gradient.
        offsets: (B, Q, M * L * P * 2) from the reference, (x, y) in pixels of the level.
        logits: (B, Q, M * L * P); softmax over L * P makes the weights.

    Returns:
        (B, Q, M * D) in the dtype of the values.

    Raises:
        ValueError: the sizes do not fit one another.
    """
    batch, tokens, heads, _ = values.shape
    queries = reference.shape[0]
    samples = logits.shape[-1]
    if (
        tokens != sum(h * w for h, w in shapes)
        or samples % (heads * len(shapes))
        or logits.shape != (batch, queries, samples)
        or offsets.shape != (batch, queries, 2 * samples)
        or reference.shape != (queries, 2)
    ):
        raise ValueError(
            f"values {tuple(values.shape)}, levels {shapes}, reference {tuple(reference.shape)}, "
            f"offsets {tuple(offsets.shape)} and logits {tuple(logits.shape)} do not fit together"
        )
    inputs = [x.contiguous() for x in (values, reference, offsets, logits)]
    return _Attention.apply(inputs[0], _levels(shapes, values.device), *inputs[1:])


@cache  # never dropped: a captured CUDA graph reads the tensor at every replay
@torch.inference_mode(mode=False)
def _levels(shapes: Shapes, device: torch.device) -> Tensor:
    """Returns height, width and first token of each level: (L, 3) int32, made once."""
    rows, start = [], 0
    for height, width in shapes:
        rows.append((height, width, start))
        start += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)


class _Attention(torch.autograd.Function):
    """:func:`attend` of contiguous tensors, with the levels as a tensor."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, levels: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        out = run_forward(values, levels, reference, offsets, logits)
        ctx.save_for_backward(values, levels, reference, offsets, logits, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
        grads = run_backward(grad.contiguous(), *ctx.saved_tensors)
        return grads[0], None, None, grads[1], grads[2]


def run_forward(
    values: Tensor,
    levels: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    *,
    warps: int = FORWARD_WARPS,
    width: int = FORWARD_WIDTH,
    heads: int = FORWARD_HEADS,
) -> Tensor:
    """Launches the forward kernel; see :func:`attend` and, for the options, the constants."""
    out = values.new_empty(values.shape[0], reference.shape[0], values.shape[2] * values.shape[3])
    grid, constants = _launch(values, levels, reference, logits, warps, width, heads)
    with torch.cuda.device_of(values):
        forward_kernel[grid](
            out,
            values,
            levels,
            reference,
            offsets,
            logits,
            values.shape[1],
            reference.shape[0],
            **constants,
            num_warps=warps,
        )
    return out


def run_backward(
    grad: Tensor,
    values: Tensor,
    levels: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    out: Tensor,
    *,
    warps: int = BACKWARD_WARPS,
    width: int | None = None,
    heads: int = BACKWARD_HEADS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward kernel: gradients of values, offsets and logits in their dtypes."""
    if width is None:
        width = BACKWARD_WIDTH if _adds_vectors(values.device) else BACKWARD_WIDTH_BEFORE_HOPPER
    compute = torch.float64 if values.dtype == torch.float64 else torch.float32
    sums = torch.zeros_like(values, dtype=compute)
    grad_offsets, grad_logits = torch.empty_like(offsets), torch.empty_like(logits)
    grid, constants = _launch(values, levels, reference, logits, warps, width, heads)
    with torch.cuda.device_of(values):
        backward_kernel[grid](
            sums,
            grad_offsets,
            grad_logits,
            grad,
            out,
            values,
            levels,
            reference,
            offsets,
            logits,
            values.shape[1],
            reference.shape[0],
            **constants,
            num_warps=warps,
        )
    return sums.to(values.dtype), grad_offsets, grad_logits


@cache
def _adds_vectors(device: torch.device) -> bool:
    """Returns whether one instruction adds several numbers to memory."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(
    values: Tensor,
    levels: Tensor,
    reference: Tensor,
    logits: Tensor,
    warps: int,
    width: int,
    group: int,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Returns the grid and the constants of a launch.

    A program has as many rows, pairs of a query and a head, as give each thread ``width`` channels:
    Triton then gives every access of channels the same layout, and moves nothing between threads.
    """
    batch, _, heads, dim = values.shape
    count = levels.shape[0]
    points = logits.shape[-1] // (heads * count)
    wide = triton.next_power_of_2(max(dim, 2 * points))  # also the offsets of a level fit in a row
    block = max(32 * warps * width // wide, 1)
    group = min(group, block, triton.next_power_of_2(heads))
    programs = triton.cdiv(reference.shape[0], block // group) * triton.cdiv(heads, group)
    return (programs, batch), {
        "HEADS": heads,
        "DIM": dim,
        "LEVELS": count,
        "POINTS": points,
        "GROUP": group,
        "BLOCK": block,
        "WIDE": wide,
        "COMPUTE": tl.float64 if values.dtype == torch.float64 else tl.float32,
    }


@triton.jit
def _rows(queries, HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Returns query, head and presence of a program's rows: (BLOCK,) each.

    Programs of the same queries and of neighbouring ones follow each other, and the batch comes
    last, so that those that run together read and add to the same part of the L2 cache.
    """
    groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    program = tl.program_id(0)
    row = tl.arange(0, BLOCK)
    query = program // groups * (BLOCK // GROUP) + row // GROUP
    head = program % groups * GROUP + row % GROUP
    return query, head, (query < queries) & (head < HEADS)


@triton.jit
def _softmax_terms(logits, present, COUNT: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns each row's greatest logit and one over its sum of exponentials."""
    most = tl.load(logits, mask=present, other=0.0).to(COMPUTE)
    for i in tl.static_range(1, COUNT):
        logit = tl.load(logits + i, mask=present, other=0.0).to(COMPUTE)
        most = tl.maximum(most, logit, propagate_nan=tl.PropagateNan.ALL)
    total = tl.zeros_like(most)
    for i in tl.static_range(COUNT):
        total += tl.exp(tl.load(logits + i, mask=present, other=0.0).to(COMPUTE) - most)
    return most, 1.0 / total


@triton.jit
def _split(x, size, present):
    """Returns the pixel before a place, the fraction after it, and whether one of both exists.

    Places are in pixels, whose centres are integers. Only those that touch the level are turned
    into integers; NaN stays in the fraction.
    """
    touches = present & (x >= -1.0) & (x < size)
    near = tl.where(touches, x, 0.0)
    before = tl.floor(near)
    return before.to(tl.int32), tl.where(x == x, near, x) - before, touches


@triton.jit
def _corner(
    left, top, x_fraction, y_fraction, x_touches, y_touches, width, height, CORNER: tl.constexpr
):
    """Returns the weights in x and y of one of the four pixels around a place, and if it exists."""
    if CORNER % 2 == 1:
        x_part = x_fraction
        seen = x_touches & (left + 1 < width)
    else:
        x_part = 1.0 - x_fraction
        seen = x_touches & (left >= 0)
    if CORNER // 2 == 1:
        y_part = y_fraction
        seen = seen & y_touches & (top + 1 < height)
    else:
        y_part = 1.0 - y_fraction
        seen = seen & y_touches & (top >= 0)
    return x_part, y_part, seen


@triton.jit(do_not_specialize=("tokens", "queries"))
def forward_kernel(
    out,
    values,
    levels,
    reference,
    offsets,
    logits,
    tokens,
    queries,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Attends with BLOCK rows; pointers as in :func:`attend`, ``levels`` as in ``_levels``."""
    query, head, present = _rows(queries, HEADS, GROUP, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * queries * HEADS + query * HEADS + head
    logits += row * (LEVELS * POINTS)
    offsets += row * (2 * LEVELS * POINTS)
    channel = tl.arange(0, WIDE)[None, :]
    values += batch * tokens * (HEADS * DIM)
    x_reference = tl.load(reference + 2 * query, mask=present, other=0.0).to(COMPUTE)
    y_reference = tl.load(reference + 2 * query + 1, mask=present, other=0.0).to(COMPUTE)
    most, scale = _softmax_terms(logits, present, LEVELS * POINTS, COMPUTE)
    total = tl.zeros((BLOCK, WIDE), COMPUTE)
    for level in range(LEVELS):
        height = tl.load(levels + 3 * level)
        width = tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        x_centre = x_reference * width.to(COMPUTE) - 0.5
        y_centre = y_reference * height.to(COMPUTE) - 0.5
        for point in tl.static_range(POINTS):
            i = level * POINTS + point
            logit = tl.load(logits + i, mask=present, other=0.0).to(COMPUTE)
            weight = tl.exp(logit - most) * scale
            x = x_centre + tl.load(offsets + 2 * i, mask=present, other=0.0).to(COMPUTE)
            y = y_centre + tl.load(offsets + 2 * i + 1, mask=present, other=0.0).to(COMPUTE)
            left, x_fraction, x_touches = _split(x, width, present)
            top, y_fraction, y_touches = _split(y, height, present)
            first = (start + top * width + left) * HEADS + head
            for corner in tl.static_range(4):
                x_part, y_part, seen = _corner(
                    left, top, x_fraction, y_fraction, x_touches, y_touches, width, height, corner
                )
                pixel = (first + (corner // 2 * width + corner % 2) * HEADS)[:, None] * DIM
                mask = seen[:, None] & (channel < DIM)
                value = tl.load(values + pixel + channel, mask=mask, other=0.0)
                total += (x_part * y_part * weight)[:, None] * value.to(COMPUTE)
    mask = present[:, None] & (channel < DIM)
    tl.store(out + row[:, None] * DIM + channel, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("tokens", "queries"))
def backward_kernel(
    grad_values,
    grad_offsets,
    grad_logits,
    grad,
    out,
    values,
    levels,
    reference,
    offsets,
    logits,
    tokens,
    queries,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Adds to ``grad_values``, which is zero at first, and writes the other gradients."""
    query, head, present = _rows(queries, HEADS, GROUP, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * queries * HEADS + query * HEADS + head
    logits += row * (LEVELS * POINTS)
    grad_logits += row * (LEVELS * POINTS)
    offsets += row * (2 * LEVELS * POINTS)
    grad_offsets += row * (2 * LEVELS * POINTS)
    channel = tl.arange(0, WIDE)[None, :]
    values += batch * tokens * (HEADS * DIM)
    grad_values += batch * tokens * (HEADS * DIM)
    x_reference = tl.load(reference + 2 * query, mask=present, other=0.0).to(COMPUTE)
    y_reference = tl.load(reference + 2 * query + 1, mask=present, other=0.0).to(COMPUTE)
    most, scale = _softmax_terms(logits, present, LEVELS * POINTS, COMPUTE)
    mask = present[:, None] & (channel < DIM)
    place = row[:, None] * DIM + channel
    g = tl.load(grad + place, mask=mask, other=0.0).to(COMPUTE)
    # The mean, by the weights, of the weights' gradients is the product of result and gradient.
    mean = tl.sum(g * tl.load(out + place, mask=mask, other=0.0).to(COMPUTE), 1)
    # The gradients of a level's points are collected in a row and written at once.
    for level in range(LEVELS):
        height = tl.load(levels + 3 * level)
        width = tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        x_centre = x_reference * width.to(COMPUTE) - 0.5
        y_centre = y_reference * height.to(COMPUTE) - 0.5
        logit_grads = tl.zeros((BLOCK, WIDE), COMPUTE)
        offset_grads = tl.zeros((BLOCK, WIDE), COMPUTE)
        for point in tl.static_range(POINTS):
            i = level * POINTS + point
            logit = tl.load(logits + i, mask=present, other=0.0).to(COMPUTE)
            weight = tl.exp(logit - most) * scale
            x = x_centre + tl.load(offsets + 2 * i, mask=present, other=0.0).to(COMPUTE)
            y = y_centre + tl.load(offsets + 2 * i + 1, mask=present, other=0.0).to(COMPUTE)
            left, x_fraction, x_touches = _split(x, width, present)
            top, y_fraction, y_touches = _split(y, height, present)
            first = (start + top * width + left) * HEADS + head
            weighted = weight[:, None] * g
            along_weight = tl.zeros((BLOCK,), COMPUTE)
            along_x = tl.zeros((BLOCK,), COMPUTE)
            along_y = tl.zeros((BLOCK,), COMPUTE)
            for corner in tl.static_range(4):
                x_part, y_part, seen = _corner(
                    left, top, x_fraction, y_fraction, x_touches, y_touches, width, height, corner
                )
                pixel = (first + (corner // 2 * width + corner % 2) * HEADS)[:, None] * DIM
                mask = seen[:, None] & (channel < DIM)
                value = tl.load(values + pixel + channel, mask=mask, other=0.0)
                along = tl.sum(g * value.to(COMPUTE), 1)
                along_weight += x_part * y_part * along
                along_x += (corner % 2 * 2 - 1) * y_part * along
                along_y += (corner // 2 * 2 - 1) * x_part * along
                added = (x_part * y_part)[:, None] * weighted
                tl.atomic_add(grad_values + pixel + channel, added, mask=mask, sem="relaxed")
            by_logit = (weight * (along_weight - mean))[:, None]
            logit_grads = tl.where(channel == point, by_logit, logit_grads)
            offset_grads = tl.where(channel == 2 * point, (weight * along_x)[:, None], offset_grads)
            offset_grads = tl.where(
                channel == 2 * point + 1, (weight * along_y)[:, None], offset_grads
            )
        i = level * POINTS + channel
        mask = present[:, None] & (channel < POINTS)
        tl.store(grad_logits[:, None] + i, logit_grads.to(grad_logits.dtype.element_ty), mask=mask)
        i += level * POINTS
        mask = present[:, None] & (channel < 2 * POINTS)
        tl.store(
            grad_offsets[:, None] + i, offset_grads.to(grad_offsets.dtype.element_ty), mask=mask
        )
