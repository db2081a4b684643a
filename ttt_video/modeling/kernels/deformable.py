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
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

Shapes = tuple[tuple[int, int], ...]

FORWARD_WARPS = 2
"""Warps of a program; from four, Triton 3.8 moves places between threads through memory."""
FORWARD_BYTES = 16
"""Bytes of a thread's channels: the widest load."""
FORWARD_HEADS = 1
"""Heads of a program. With one, its rows are neighbouring queries, which read the same pixels."""

BACKWARD_WARPS = 1
"""Warps of a program; no warp waits for another."""
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
        ValueError: the sizes do not fit one another, or offsets and logits differ in dtype.
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
        or offsets.dtype != logits.dtype
    ):
        raise ValueError(
            f"values {tuple(values.shape)}, levels {shapes}, reference {tuple(reference.shape)}, "
            f"offsets {tuple(offsets.shape)} {offsets.dtype} and logits {tuple(logits.shape)} "
            f"{logits.dtype} do not fit together"
        )
    tensors = (values, _levels(shapes, values.device), reference, offsets, logits)
    return _Attention.apply(*(x.contiguous() for x in tensors))


@cache  # never dropped: a captured CUDA graph reads the tensor at every replay
@torch.inference_mode(mode=False)
def _levels(shapes: Shapes, device: torch.device) -> Tensor:
    """Returns height, width and first token of each level: (L, 3) int32, made once."""
    rows, start = [], 0
    for height, width in shapes:
        rows.append((height, width, start))
        start += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)


class Inputs(NamedTuple):
    """What both kernels read, contiguous: as in :func:`attend`, and the levels as a tensor."""

    values: Tensor
    levels: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor


class _Attention(torch.autograd.Function):
    """:func:`attend` of :class:`Inputs`."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        out = run_forward(Inputs(*tensors))
        ctx.save_for_backward(out, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
        out, *tensors = ctx.saved_tensors
        values, offsets, logits = run_backward(grad.contiguous(), out, Inputs(*tensors))
        return values, None, None, offsets, logits


def run_forward(
    inputs: Inputs,
    *,
    warps: int = FORWARD_WARPS,
    width: int | None = None,
    heads: int = FORWARD_HEADS,
) -> Tensor:
    """Launches the forward kernel; ``width`` is channels of a thread, constants say the rest."""
    values, reference = inputs.values, inputs.reference
    width = width or FORWARD_BYTES // values.dtype.itemsize
    out = values.new_empty(values.shape[0], reference.shape[0], values.shape[2] * values.shape[3])
    grid, constants = _launch(inputs, warps, width, heads)
    with torch.cuda.device_of(values):
        forward_kernel[grid](out, *_arguments(inputs), **constants, num_warps=warps)
    return out


def run_backward(
    grad: Tensor,
    out: Tensor,
    inputs: Inputs,
    *,
    warps: int = BACKWARD_WARPS,
    width: int | None = None,
    heads: int = BACKWARD_HEADS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward kernel: gradients of values, offsets and logits in their dtypes."""
    values = inputs.values
    if width is None:
        width = BACKWARD_WIDTH if _adds_vectors(values.device) else BACKWARD_WIDTH_BEFORE_HOPPER
    compute = torch.float64 if values.dtype == torch.float64 else torch.float32
    sums = torch.zeros_like(values, dtype=compute)
    grad_offsets, grad_logits = torch.empty_like(inputs.offsets), torch.empty_like(inputs.logits)
    grid, constants = _launch(inputs, warps, width, heads)
    arguments = (sums, grad_offsets, grad_logits, grad, out, *_arguments(inputs))
    with torch.cuda.device_of(values):
        backward_kernel[grid](*arguments, **constants, num_warps=warps)
    return sums.to(values.dtype), grad_offsets, grad_logits


@cache
def _adds_vectors(device: torch.device) -> bool:
    """Returns whether one instruction adds several numbers to memory."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    """Returns what the kernels call ``values, levels, ..., tokens, queries``."""
    values, levels, reference, offsets, logits = inputs
    size = offsets.dtype.itemsize
    if size <= 4:  # the same memory as integers, each of them an x and a y
        offsets = offsets.view(torch.int64 if size == 4 else torch.int32)
    return values, levels, reference, offsets, logits, values.shape[1], reference.shape[0]


def _launch(
    inputs: Inputs, warps: int, width: int, group: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Returns the grid and the constants of a launch.

    A program has as many rows, pairs of a query and a head, as give each thread ``width`` channels:
    Triton then gives every access of channels the same layout, and moves nothing between threads.
    """
    batch, _, heads, dim = inputs.values.shape
    levels = inputs.levels.shape[0]
    points = inputs.logits.shape[-1] // (heads * levels)
    # Also a row's logits and the gradients of a level's offsets lie in as many columns.
    wide = triton.next_power_of_2(max(dim, 2 * points, levels * points))
    block = max(32 * warps * width // wide, 1)
    group = min(group, block, triton.next_power_of_2(heads))
    programs = triton.cdiv(inputs.reference.shape[0], block // group) * triton.cdiv(heads, group)
    return (programs, batch), {
        "HEADS": heads,
        "DIM": dim,
        "LEVELS": levels,
        "POINTS": points,
        "GROUP": group,
        "BLOCK": block,
        "WIDE": wide,
        "COMPUTE": tl.float64 if inputs.values.dtype == torch.float64 else tl.float32,
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
def _softmax_terms(logits, present, channel, COUNT: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns each row's greatest logit and one over its sum of exponentials.

    Logits lie where channels do, so that nothing moves between threads but the sums.
    """
    listed = channel < COUNT
    row = tl.load(logits[:, None] + channel, mask=present[:, None] & listed, other=0.0).to(COMPUTE)
    most = tl.max(tl.where(listed, row, float("-inf")), 1)
    total = tl.sum(tl.where(listed, tl.exp(row - most[:, None]), 0.0), 1)
    return most, 1.0 / total


@triton.jit
def _load_offset(offsets, i, present, kind: tl.constexpr, COMPUTE: tl.constexpr):
    """Returns x and y of the i-th offset; ``offsets`` points to integers of the size of both.

    Threads of a row read the same address: one load of both takes half the time of two. There is
    no such integer for float64, whose numbers are read one by one.
    """
    if kind == tl.float64:
        x = tl.load(offsets + 2 * i, mask=present, other=0.0)
        y = tl.load(offsets + 2 * i + 1, mask=present, other=0.0)
    else:
        both = tl.load(offsets + i, mask=present, other=0)
        if kind == tl.float32:
            x = both.to(tl.int32).to(kind, bitcast=True)
            y = (both >> 32).to(tl.int32).to(kind, bitcast=True)
        else:
            x = both.to(tl.int16).to(kind, bitcast=True)
            y = (both >> 16).to(tl.int16).to(kind, bitcast=True)
    return x.to(COMPUTE), y.to(COMPUTE)


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
def _level(levels, level, x_reference, y_reference, COMPUTE: tl.constexpr):
    """Returns height, width and first token of a level, and the references in its pixels."""
    height = tl.load(levels + 3 * level)
    width = tl.load(levels + 3 * level + 1)
    start = tl.load(levels + 3 * level + 2)
    x_centre = x_reference * width.to(COMPUTE) - 0.5
    return height, width, start, x_centre, y_reference * height.to(COMPUTE) - 0.5


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
    out, values, levels, reference, offsets, logits, tokens, queries,
    HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Attends with BLOCK rows.

    Pointers are as in :func:`attend`, but ``levels`` as in ``_levels`` and ``offsets`` as in
    ``_arguments``. WIDE columns hold the DIM channels.
    """
    query, head, present = _rows(queries, HEADS, GROUP, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * queries * HEADS + query * HEADS + head
    sample = row * (LEVELS * POINTS)
    kind: tl.constexpr = logits.dtype.element_ty
    channel = tl.arange(0, WIDE)[None, :]
    values += batch * tokens * (HEADS * DIM)
    x_reference = tl.load(reference + 2 * query, mask=present, other=0.0).to(COMPUTE)
    y_reference = tl.load(reference + 2 * query + 1, mask=present, other=0.0).to(COMPUTE)
    logits += sample
    most, scale = _softmax_terms(logits, present, channel, LEVELS * POINTS, COMPUTE)
    total = tl.zeros((BLOCK, WIDE), COMPUTE)
    for level in range(LEVELS):
        height, width, start, x_centre, y_centre = _level(
            levels, level, x_reference, y_reference, COMPUTE
        )
        for point in tl.static_range(POINTS):
            i = level * POINTS + point
            logit = tl.load(logits + i, mask=present, other=0.0).to(COMPUTE)
            weight = tl.exp(logit - most) * scale
            x, y = _load_offset(offsets, sample + i, present, kind, COMPUTE)
            left, x_fraction, x_touches = _split(x_centre + x, width, present)
            top, y_fraction, y_touches = _split(y_centre + y, height, present)
            first = (start + top * width + left) * HEADS + head
            for corner in tl.static_range(4):
                x_part, y_part, seen = _corner(
                    left, top, x_fraction, y_fraction, x_touches, y_touches, width, height, corner
                )
                pixel = (first + (corner // 2 * width + corner % 2) * HEADS)[:, None] * DIM
                seen_here = seen[:, None] & (channel < DIM)
                value = tl.load(values + pixel + channel, mask=seen_here, other=0.0)
                total += (x_part * y_part * weight)[:, None] * value.to(COMPUTE)
    place = row[:, None] * DIM + channel
    mask = present[:, None] & (channel < DIM)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("tokens", "queries"))
def backward_kernel(
    grad_values, grad_offsets, grad_logits, grad, out,
    values, levels, reference, offsets, logits, tokens, queries,
    HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Adds to ``grad_values``, which is zero at first, and writes the other gradients.

    Arguments are those of :func:`forward_kernel`; gradients lie as what they are gradients of.
    """
    query, head, present = _rows(queries, HEADS, GROUP, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * queries * HEADS + query * HEADS + head
    sample = row * (LEVELS * POINTS)
    kind: tl.constexpr = logits.dtype.element_ty
    channel = tl.arange(0, WIDE)[None, :]
    values += batch * tokens * (HEADS * DIM)
    grad_values += batch * tokens * (HEADS * DIM)
    x_reference = tl.load(reference + 2 * query, mask=present, other=0.0).to(COMPUTE)
    y_reference = tl.load(reference + 2 * query + 1, mask=present, other=0.0).to(COMPUTE)
    logits += sample
    most, scale = _softmax_terms(logits, present, channel, LEVELS * POINTS, COMPUTE)
    place = row[:, None] * DIM + channel
    mask = present[:, None] & (channel < DIM)
    g = tl.load(grad + place, mask=mask, other=0.0).to(COMPUTE)
    # The mean, by the weights, of the weights' gradients is the product of result and gradient.
    mean = tl.sum(g * tl.load(out + place, mask=mask, other=0.0).to(COMPUTE), 1)
    for level in range(LEVELS):
        height, width, start, x_centre, y_centre = _level(
            levels, level, x_reference, y_reference, COMPUTE
        )
        # The gradients of a level's points are collected in rows and written at once.
        logit_grads = tl.zeros((BLOCK, WIDE), COMPUTE)
        offset_grads = tl.zeros((BLOCK, WIDE), COMPUTE)
        for point in tl.static_range(POINTS):
            i = level * POINTS + point
            logit = tl.load(logits + i, mask=present, other=0.0).to(COMPUTE)
            weight = tl.exp(logit - most) * scale
            x, y = _load_offset(offsets, sample + i, present, kind, COMPUTE)
            left, x_fraction, x_touches = _split(x_centre + x, width, present)
            top, y_fraction, y_touches = _split(y_centre + y, height, present)
            first = (start + top * width + left) * HEADS + head
            weighted = weight[:, None] * g
            by_weight = tl.zeros((BLOCK,), COMPUTE)
            by_x = tl.zeros((BLOCK,), COMPUTE)
            by_y = tl.zeros((BLOCK,), COMPUTE)
            for corner in tl.static_range(4):
                x_part, y_part, seen = _corner(
                    left, top, x_fraction, y_fraction, x_touches, y_touches, width, height, corner
                )
                pixel = (first + (corner // 2 * width + corner % 2) * HEADS)[:, None] * DIM
                seen_here = seen[:, None] & (channel < DIM)
                value = tl.load(values + pixel + channel, mask=seen_here, other=0.0)
                along = tl.sum(g * value.to(COMPUTE), 1)
                by_weight += x_part * y_part * along
                by_x += (corner % 2 * 2 - 1) * y_part * along
                by_y += (corner // 2 * 2 - 1) * x_part * along
                added = (x_part * y_part)[:, None] * weighted
                tl.atomic_add(grad_values + pixel + channel, added, mask=seen_here, sem="relaxed")
            by_logit = (weight * (by_weight - mean))[:, None]
            by_x = (weight * by_x)[:, None]
            by_y = (weight * by_y)[:, None]
            logit_grads = tl.where(channel == point, by_logit, logit_grads)
            offset_grads = tl.where(channel == 2 * point, by_x, offset_grads)
            offset_grads = tl.where(channel == 2 * point + 1, by_y, offset_grads)
        places = sample[:, None] + level * POINTS + channel
        own = present[:, None] & (channel < POINTS)
        tl.store(grad_logits + places, logit_grads.to(kind), mask=own)
        places = 2 * (sample[:, None] + level * POINTS) + channel
        own = present[:, None] & (channel < 2 * POINTS)
        tl.store(grad_offsets + places, offset_grads.to(kind), mask=own)
