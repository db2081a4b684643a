"""Group norms of channels-last maps in Triton, with what follows them in one pass.

A map is (B, H * W, C) tokens, as linear layers and channels-last convolutions write it. Statistics
are float32 (float64 of float64), from means and squared deviations of parts, so that a large mean
costs no digits. What follows a norm is a ReLU or, in the FPN, the sum with a coarser map that is
enlarged bilinearly: neither is written to memory by itself.

Bytes per element of the FPN's finest map under bfloat16 autocast, forward: a norm and the sum with
a coarser map take 40 by PyTorch's operations (cast 6, norm 12, enlarged map 4, sum 12, cast 6), 7
here; a norm and a ReLU 32 and 6.
"""

from __future__ import annotations

import triton
import triton.language as tl

ELEMENTS = 8192
"""Elements of a program's block: 32 a thread of 8 warps. On an H200, the norms of the FPN's finest
map take 0.6 of the time that they take with half of that."""

WARPS = 8

PARTS = 512
"""Programs that sum over a batch, about four for each of 132 processors. It is fixed, so that sums
are the same on every card."""

MERGED = 2048
"""Values of parts that one program merges, so that few parts take few programs."""


@triton.jit(do_not_specialize=["tokens"])
def part_statistics(
    x,
    parts,
    tokens,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Writes each channel's mean and squared deviations over a part of an image's tokens.

    ``parts`` is (B, parts, 2, DIM); part p has the blocks p, p + parts, ... of rows. Sums are of
    distances to the part's first token, so that a large mean costs no digits, and each thread keeps
    its own until the end.
    """
    image, part, count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, BLOCK_DIM)
    in_dim = column < DIM
    x += image.to(tl.int64) * tokens * DIM
    begun = in_dim & (part * BLOCK_ROWS < tokens)
    first = tl.load(x + (part * BLOCK_ROWS).to(tl.int64) * DIM + column, begun, other=0.0).to(ACC)
    number = tl.zeros((), ACC)
    total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), ACC)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_DIM), ACC)
    for block in range(part, tl.cdiv(tokens, BLOCK_ROWS), count):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (row < tokens)[:, None] & in_dim[None, :]
        at = row[:, None].to(tl.int64) * DIM + column[None, :]
        value = tl.load(x + at, inside, other=0.0).to(ACC) - first[None, :]
        value = tl.where(inside, value, 0.0)
        total += value
        squares += value * value
        number += tl.minimum(tokens - block * BLOCK_ROWS, BLOCK_ROWS).to(ACC)
    distance = tl.sum(total, 0) / tl.maximum(number, 1.0)
    deviations = tl.sum(squares, 0) - distance * distance * number
    place = parts + ((image * count + part) * 2).to(tl.int64) * DIM + column
    tl.store(place, first + distance, in_dim)
    tl.store(place + DIM, tl.maximum(deviations, 0.0), in_dim)


@triton.jit(do_not_specialize=["tokens", "count"])
def group_statistics(
    parts,
    mean,
    rstd,
    tokens,
    count,
    EPS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
):
    """Merges the parts of some groups of an image to their means and reciprocal deviations."""
    image = tl.program_id(0)
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    part, channel = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_GROUP)
    in_groups = group < DIM // GROUP
    inside = in_groups[None, :, None] & (channel < GROUP)[None, None, :]
    inside = inside & (part < count)[:, None, None]
    at = ((image * count + part) * 2)[:, None, None] * DIM
    at = at + (group * GROUP)[None, :, None] + channel[None, None, :]
    means = tl.load(parts + at, inside, other=0.0)
    squares = tl.load(parts + at + DIM, inside, other=0.0)
    # Part p has every count-th block from p on, all of them whole but the image's last.
    blocks = tl.cdiv(tokens, BLOCK_ROWS)
    rows = ((blocks - part + count - 1) // count) * BLOCK_ROWS
    short = blocks * BLOCK_ROWS - tokens
    rows = tl.where(part == (blocks - 1) % count, rows - short, rows)
    weights = tl.where(inside, rows[:, None, None].to(ACC), 0.0)
    number = tokens.to(ACC) * GROUP
    centre = tl.sum(tl.sum(weights * means, 2), 0) / number
    centred = means - centre[None, :, None]
    variance = tl.sum(tl.sum(squares + weights * centred * centred, 2), 0) / number
    at = image * (DIM // GROUP) + group
    tl.store(mean + at, centre, in_groups)
    tl.store(rstd + at, 1.0 / tl.sqrt(variance + EPS), in_groups)


@triton.jit
def _sources(at, length, fine, ACC: tl.constexpr):
    """Returns where fine cells lie among coarse ones: the cell before, and the way to the next."""
    place = (at.to(ACC) + 0.5) * (length.to(ACC) / fine.to(ACC)) - 0.5
    place = tl.minimum(tl.maximum(place, 0.0), length.to(ACC) - 1.0)
    cell = tl.floor(place).to(tl.int32)
    return cell, place - cell.to(ACC)


@triton.jit(do_not_specialize=["height", "width", "coarse_height", "coarse_width"])
def normalise(
    x,
    mean,
    rstd,
    weight,
    bias,
    coarse,
    out,
    height,
    width,
    coarse_height,
    coarse_width,
    RELU: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Writes the normalised tokens of a block, after a ReLU or the sum with a coarser map."""
    image = tl.program_id(1)
    tokens = height * width
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    in_rows, in_dim = row < tokens, column < DIM
    inside = in_rows[:, None] & in_dim[None, :]
    base = image.to(tl.int64) * tokens * DIM
    at = base + row[:, None].to(tl.int64) * DIM + column[None, :]
    group = image * (DIM // GROUP) + column // GROUP
    centre = tl.load(mean + group, in_dim, other=0.0)
    scale = tl.load(rstd + group, in_dim, other=0.0)
    w = tl.load(weight + column, in_dim, other=0.0).to(ACC)
    b = tl.load(bias + column, in_dim, other=0.0).to(ACC)
    value = tl.load(x + at, inside, other=0.0).to(ACC)
    value = (value - centre[None, :]) * (scale * w)[None, :] + b[None, :]
    if RELU:
        value = tl.maximum(value, 0.0)
    if coarse is not None:
        top, down = _sources(row // width, coarse_height, height, ACC)
        left, right = _sources(row % width, coarse_width, width, ACC)
        bottom = tl.minimum(top + 1, coarse_height - 1)
        other = tl.minimum(left + 1, coarse_width - 1)
        start = image.to(tl.int64) * coarse_height * coarse_width * DIM + column[None, :]
        upper = start + (top * coarse_width)[:, None].to(tl.int64) * DIM
        lower = start + (bottom * coarse_width)[:, None].to(tl.int64) * DIM
        left, other = left[:, None] * DIM, other[:, None] * DIM
        right, down = right[:, None], down[:, None]
        above = tl.load(coarse + upper + left, inside, other=0.0).to(ACC) * (1.0 - right)
        above += tl.load(coarse + upper + other, inside, other=0.0).to(ACC) * right
        below = tl.load(coarse + lower + left, inside, other=0.0).to(ACC) * (1.0 - right)
        below += tl.load(coarse + lower + other, inside, other=0.0).to(ACC) * right
        value += above * (1.0 - down) + below * down
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens"])
def part_gradients(
    grad,
    x,
    mean,
    rstd,
    weight,
    bias,
    parts,
    tokens,
    RELU: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Sums a part's gradients of each channel's weight and bias: ``parts`` (2, B, parts, DIM)."""
    image, part, count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, BLOCK_DIM)
    in_dim = column < DIM
    base = image.to(tl.int64) * tokens * DIM
    group = image * (DIM // GROUP) + column // GROUP
    centre = tl.load(mean + group, in_dim, other=0.0)[None, :]
    scale = tl.load(rstd + group, in_dim, other=0.0)[None, :]
    w = tl.load(weight + column, in_dim, other=0.0).to(ACC)[None, :]
    b = tl.load(bias + column, in_dim, other=0.0).to(ACC)[None, :]
    weight_sum = tl.zeros((BLOCK_ROWS, BLOCK_DIM), ACC)
    bias_sum = tl.zeros((BLOCK_ROWS, BLOCK_DIM), ACC)
    for block in range(part, tl.cdiv(tokens, BLOCK_ROWS), count):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (row < tokens)[:, None] & in_dim[None, :]
        at = base + row[:, None].to(tl.int64) * DIM + column[None, :]
        unit = (tl.load(x + at, inside, other=0.0).to(ACC) - centre) * scale
        value = tl.load(grad + at, inside, other=0.0).to(ACC)
        if RELU:
            value = tl.where(unit * w + b > 0, value, 0.0)
        weight_sum += value * unit  # outside, the gradient is 0
        bias_sum += value
    place = parts + (image * count + part).to(tl.int64) * DIM + column
    tl.store(place, tl.sum(weight_sum, 0), in_dim)
    place += (tl.num_programs(0) * count).to(tl.int64) * DIM
    tl.store(place, tl.sum(bias_sum, 0), in_dim)


@triton.jit(do_not_specialize=["tokens"])
def input_gradients(
    grad,
    x,
    mean,
    rstd,
    weight,
    bias,
    along,
    level,
    out,
    tokens,
    RELU: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Writes the gradient of a block of x; ``along`` and ``level`` are (B, groups) means."""
    image = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    in_dim = column < DIM
    inside = (row < tokens)[:, None] & in_dim[None, :]
    at = image.to(tl.int64) * tokens * DIM + row[:, None].to(tl.int64) * DIM + column[None, :]
    group = image * (DIM // GROUP) + column // GROUP
    centre = tl.load(mean + group, in_dim, other=0.0)[None, :]
    scale = tl.load(rstd + group, in_dim, other=0.0)[None, :]
    w = tl.load(weight + column, in_dim, other=0.0).to(ACC)[None, :]
    b = tl.load(bias + column, in_dim, other=0.0).to(ACC)[None, :]
    unit = (tl.load(x + at, inside, other=0.0).to(ACC) - centre) * scale
    value = tl.load(grad + at, inside, other=0.0).to(ACC)
    if RELU:
        value = tl.where(unit * w + b > 0, value, 0.0)
    value = value * w - unit * tl.load(along + group, in_dim, other=0.0)[None, :]
    value = (value - tl.load(level + group, in_dim, other=0.0)[None, :]) * scale
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["height", "width", "coarse_height", "coarse_width"])
def coarse_gradients(
    grad,
    out,
    height,
    width,
    coarse_height,
    coarse_width,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Gathers the gradient of a coarser map from the cells that read it, in a fixed order.

    ``TALL`` and ``WIDE`` are the most rows and columns of fine cells that read one coarse cell.
    """
    image = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    inside = (row < coarse_height * coarse_width)[:, None] & (column < DIM)[None, :]
    y, x = row // coarse_width, row % coarse_width
    base = image.to(tl.int64) * height * width * DIM + column[None, :]
    tall, wide = height.to(ACC) / coarse_height.to(ACC), width.to(ACC) / coarse_width.to(ACC)
    # The first fine cells whose centre is less than one coarse cell before this cell's centre.
    first_y = tl.floor((y.to(ACC) - 0.5) * tall - 0.5).to(tl.int32)
    first_x = tl.floor((x.to(ACC) - 0.5) * wide - 0.5).to(tl.int32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), ACC)
    for down in range(TALL):
        fine_y = first_y + down
        cell, way = _sources(fine_y, coarse_height, height, ACC)
        weight_y = tl.maximum(1.0 - tl.abs(cell.to(ACC) + way - y.to(ACC)), 0.0)
        reads_y = (fine_y >= 0) & (fine_y < height) & (weight_y > 0)
        for right in range(WIDE):
            fine_x = first_x + right
            cell, way = _sources(fine_x, coarse_width, width, ACC)
            weight = weight_y * tl.maximum(1.0 - tl.abs(cell.to(ACC) + way - x.to(ACC)), 0.0)
            reads = reads_y & (fine_x >= 0) & (fine_x < width) & (weight > 0)
            at = base + (fine_y * width + fine_x)[:, None].to(tl.int64) * DIM
            value = tl.load(grad + at, inside & reads[:, None], other=0.0).to(ACC)
            total += value * weight[:, None]
    at = image.to(tl.int64) * coarse_height * coarse_width * DIM + column[None, :]
    at += row[:, None].to(tl.int64) * DIM
    tl.store(out + at, total.to(out.dtype.element_ty), inside)
