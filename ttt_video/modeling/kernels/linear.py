"""Linear layers and MLPs whose backward pass sums columns and applies activations in Triton.

The products stay cuBLAS's. PyTorch's sum over the rows of a bfloat16 gradient, which is what a bias
learns from, reaches a quarter of a GPU's bandwidth; autocast then casts gradients of weights and
biases, which are written as float32 here. All sums are float32 (float64 of float64) and their order
depends on shapes alone, so they are the same on every card.

Bytes per element of an MLP's hidden layer in bfloat16, beside the products: forward 4 (GELU) or 0
(ReLU, which the product applies). Backward: 8 before (activation's gradient 6, bias 2), 6 after.
Both inputs of the backward pass, the hidden layer before GELU and after it, are kept as PyTorch
does: to recompute one of them would keep 2 bytes less and write 2 more. ReLU needs the second only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .norms import product_dtype

PROGRAMS = 1024
"""Programs that share a sum, eight for each of 132 processors, each with one row of partial sums.
It is fixed, so that sums are the same on every card."""

COLUMNS = 128
"""Columns of a program: 256 bytes of each row in bfloat16, 16 lanes with 16 bytes each."""

SUM_ROWS = 32
"""Rows that a program sums at once: with 4 warps four loads of 16 bytes for each thread."""

GRADIENT_ROWS = 16
"""The same where an activation's gradient is computed, which takes three times the registers."""

WARPS = 4
"""Warps of the kernels that read rows."""

LAST_ROWS, LAST_COLUMNS, LAST_WARPS = 512, 16, 8
"""Tile of the sum of partial sums: all of them in two or three steps, as they are few and near."""

GELU_ELEMENTS = 2048
"""Elements of a program that applies GELU: two loads of 16 bytes for each thread."""

_MIXED_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads()
"""Whether this PyTorch (2.8 and later) has products of bfloat16 that are written as float32."""


@triton.jit
def _normal(x, EXACT: tl.constexpr):
    """Returns the normal distribution's cumulative probability and its density.

    Unless EXACT, Zelen and Severo's polynomial (Abramowitz and Stegun 26.2.17), whose error is
    below 1e-7 (bfloat16 resolves 4e-3) and which shares the density's exponential function.
    """
    density = tl.exp2(x * x * -0.7213475204444817) * 0.3989422804014327
    if EXACT:
        probability = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        root = 1.0 + 0.2316419 * tl.abs(x)
        t = tl.rsqrt(root * root)  # one instruction, and a division would be several
        tail = t * 1.330274429 - 1.821255978
        tail = tail * t + 1.781477937
        tail = tail * t - 0.356563782
        tail = tail * t + 0.319381530
        tail = tail * t * density
        probability = tl.where(x < 0, tail, 1.0 - tail)
    return probability, density


@triton.jit
def gelu_kernel(x, out, total, ACC: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """Applies GELU to (total,) elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = i < tl.minimum(total - start, BLOCK).to(tl.int32)
    value = tl.load(x + start + i, inside, other=0.0).to(ACC)
    probability, _ = _normal(value, EXACT)
    tl.store(out + start + i, (value * probability).to(out.dtype.element_ty), inside)


@triton.jit
def column_sums(x, sums, total, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes each program's sums of its rows: ``sums`` (programs, width).

    ``x`` has ``total`` elements in rows of ``width``; the last row may end early. Programs along
    the first axis share columns, those along the second rows.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * width + column[None, :]
    step = width * ROWS
    found = tl.zeros((ROWS, COLUMNS), sums.dtype.element_ty)
    for block in range(
        tl.program_id(1), tl.cdiv(tl.cast(total, tl.int64), step), tl.num_programs(1)
    ):
        start = block * step
        inside = (place < tl.minimum(total - start, step).to(tl.int32)) & (column < width)[None, :]
        found += tl.load(x + start + place, inside, other=0.0).to(found.dtype)
    tl.store(sums + tl.program_id(1) * width + column, tl.sum(found, 0), column < width)


@triton.jit
def activation_gradients(
    grad,
    kept,
    out,
    sums,
    total,
    width,
    ACC: tl.constexpr,
    RELU: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the gradient of an activation's input, and :func:`column_sums` of it.

    ``kept`` is the output of ReLU or the input of GELU. ``out`` may be ``grad``; ``sums`` is None
    where nobody asks for them.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * width + column[None, :]
    step = width * ROWS
    found = tl.zeros((ROWS, COLUMNS), ACC)
    for block in range(
        tl.program_id(1), tl.cdiv(tl.cast(total, tl.int64), step), tl.num_programs(1)
    ):
        start = block * step
        inside = (place < tl.minimum(total - start, step).to(tl.int32)) & (column < width)[None, :]
        value = tl.load(grad + start + place, inside, other=0.0).to(ACC)
        state = tl.load(kept + start + place, inside, other=0.0).to(ACC)
        if RELU:
            value = tl.where(state > 0, value, 0.0)
        else:
            probability, density = _normal(state, EXACT)
            value *= probability + state * density
        tl.store(out + start + place, value.to(out.dtype.element_ty), inside)
        if sums is not None:
            found += value
    if sums is not None:
        tl.store(sums + tl.program_id(1) * width + column, tl.sum(found, 0), column < width)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _precision(x: Tensor) -> dict[str, Any]:
    """Returns what is computed in, and whether GELU needs more than a polynomial."""
    return {
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "EXACT": x.dtype in (torch.float32, torch.float64),
    }


def _shares(x: Tensor, rows: int, programs: int) -> tuple[int, tuple[int, int]]:
    """Returns the width that (N, C) rows are read in, and the grid of programs.

    Several short rows are read as one, so that programs have whole columns: no lane is idle.
    """
    width = math.lcm(x.shape[1], COLUMNS)
    across = width // COLUMNS
    down = min(triton.cdiv(x.numel(), width * rows), programs // across)
    return width, (across, max(1, down))


def _last_sum(partial: Tensor, channels: int) -> Tensor:
    """Returns the sum of (programs, width) partial sums: (C,)."""
    if partial.numel() == channels:
        return partial.view(channels)
    sums = partial.new_empty(channels)
    column_sums[(triton.cdiv(channels, LAST_COLUMNS), 1)](
        partial,
        sums,
        partial.numel(),
        channels,
        ROWS=LAST_ROWS,
        COLUMNS=LAST_COLUMNS,
        num_warps=LAST_WARPS,
    )
    return sums


def column_sum(
    x: Tensor, *, programs: int = PROGRAMS, rows: int = SUM_ROWS, warps: int = WARPS
) -> Tensor:
    """Returns the sum over the rows of (N, C) in float32 (float64 of float64): (C,).

    It reads each element once. The order of the sum depends on the shape alone.

    Args:
        x: (N, C) of any floating dtype.
        programs, rows, warps: how the kernel is started.
    """
    x = x.contiguous()
    if not x.numel():
        return x.new_zeros(x.shape[1], dtype=_sum_dtype(x))
    width, grid = _shares(x, rows, programs)
    partial = x.new_empty((grid[1], width), dtype=_sum_dtype(x))
    column_sums[grid](x, partial, x.numel(), width, ROWS=rows, COLUMNS=COLUMNS, num_warps=warps)
    return _last_sum(partial, x.shape[1])


def activation_gradient(
    grad: Tensor,
    kept: Tensor,
    *,
    relu: bool,
    sums: bool = True,
    programs: int = PROGRAMS,
    rows: int = GRADIENT_ROWS,
    warps: int = WARPS,
) -> Tensor | None:
    """Multiplies a gradient by its activation's slope in place; returns its :func:`column_sum`.

    Args:
        grad: (N, C), contiguous, of the activation's output; becomes that of its input.
        kept: (N, C), contiguous: the output of ReLU, or the input of GELU (the exact one).
        relu: which of the two.
        sums: False returns None.
        programs, rows, warps: how the kernel is started.
    """
    channels = grad.shape[1]
    if not grad.numel():
        return grad.new_zeros(channels, dtype=_sum_dtype(grad)) if sums else None
    width, grid = _shares(grad, rows, programs)
    partial = grad.new_empty((grid[1], width), dtype=_sum_dtype(grad)) if sums else None
    activation_gradients[grid](
        grad,
        kept,
        grad,
        partial,
        grad.numel(),
        width,
        RELU=relu,
        ROWS=rows,
        COLUMNS=COLUMNS,
        num_warps=warps,
        **_precision(grad),
    )
    return None if partial is None else _last_sum(partial, channels)


def gelu(x: Tensor, *, elements: int = GELU_ELEMENTS, warps: int = WARPS) -> Tensor:
    """Returns GELU of contiguous x, the exact one; without a gradient of its own."""
    out = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            gelu_kernel[(triton.cdiv(x.numel(), elements),)](
                x,
                out,
                x.numel(),
                BLOCK=elements,
                num_warps=warps,
                **_precision(x),
            )
    return out


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a @ b in a dtype; sums are float32, and are rounded once where PyTorch can."""
    if dtype == torch.float32 != a.dtype and a.is_cuda and _MIXED_PRODUCTS:
        return torch.ops.aten.mm.dtype(a, b, dtype)
    return torch.mm(a, b).to(dtype)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


class _Linear(torch.autograd.Function):
    """Multiplies (N, C) rows in their dtype; gradients of parameters have the parameters' dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        learns_x, learns_weight, learns_bias = ctx.needs_input_grad
        low = weight.to(x.dtype)
        ctx.save_for_backward(x if learns_weight else None, low if learns_x else None)
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None and learns_bias else None
        return F.linear(x, low, _cast(bias, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        grad = grad.contiguous()
        return (
            None if weight is None else torch.mm(grad, weight),
            None if x is None else _product(grad.t(), x, weight_dtype),
            None if bias_dtype is None else column_sum(grad).to(bias_dtype),
        )


class _Mlp(torch.autograd.Function):
    """Multiplies (N, C) rows, applies ReLU or GELU, and multiplies again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        relu: bool,
    ) -> Tensor:
        learns_x, learns_1, learns_b1, learns_2, learns_b2, _ = ctx.needs_input_grad
        low1, low2 = weight1.to(x.dtype), weight2.to(x.dtype)
        hidden = None
        if relu and bias1 is not None:
            active = torch._addmm_activation(bias1.to(x.dtype), x, low1.t())
        elif relu:
            active = torch.mm(x, low1.t()).relu_()
        else:
            hidden = F.linear(x, low1, _cast(bias1, x.dtype))
            active = gelu(hidden)
        learns_hidden = learns_x or learns_1 or learns_b1
        kept = active if relu else hidden
        ctx.save_for_backward(
            x if learns_1 else None,
            low1 if learns_x else None,
            kept if learns_hidden else None,
            low2 if learns_hidden else None,
            active if learns_2 else None,
        )
        ctx.dtypes = weight1.dtype, weight2.dtype
        ctx.bias_dtypes = (
            bias1.dtype if bias1 is not None and learns_b1 else None,
            bias2.dtype if bias2 is not None and learns_b2 else None,
        )
        ctx.relu = relu
        return F.linear(active, low2, _cast(bias2, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, kept, weight2, active = ctx.saved_tensors
        dtype1, dtype2 = ctx.bias_dtypes
        grad = grad.contiguous()
        grads: list[Tensor | None] = [None] * 6
        if active is not None:
            grads[3] = _product(grad.t(), active, ctx.dtypes[1])
        if dtype2 is not None:
            grads[4] = column_sum(grad).to(dtype2)
        if kept is None:
            return tuple(grads)
        hidden = torch.mm(grad, weight2)
        sums = activation_gradient(hidden, kept, relu=ctx.relu, sums=dtype1 is not None)
        if weight1 is not None:
            grads[0] = torch.mm(hidden, weight1)
        if x is not None:
            grads[1] = _product(hidden.t(), x, ctx.dtypes[0])
        if sums is not None:
            grads[2] = sums.to(dtype1)
        return tuple(grads)


def _rows(x: Tensor) -> Tensor:
    """Returns (..., C) as (N, C) in the dtype of products."""
    return x.to(product_dtype(x)).flatten(0, -2) if x.dim() > 1 else x.to(product_dtype(x))[None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns ``F.linear(x, weight, bias)``, in autocast's dtype where it is on.

    Args:
        x: (..., C).
        weight: (D, C); bias: (D,) or None. What needs no gradient takes no work in backward.
    """
    out = _Linear.apply(_rows(x), weight, bias)
    return out.view(*x.shape[:-1], len(weight))


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    relu: bool,
) -> Tensor:
    """Returns two linear layers with an activation between them, in autocast's dtype.

    Args:
        x: (..., C).
        weight1: (H, C); bias1: (H,) or None.
        weight2: (D, H); bias2: (D,) or None.
        relu: whether it is ReLU, or else GELU, the exact one.
    """
    out = _Mlp.apply(_rows(x), weight1, bias1, weight2, bias2, relu)
    return out.view(*x.shape[:-1], len(weight2))
