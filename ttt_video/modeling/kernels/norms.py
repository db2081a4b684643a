"""Layer norms in Triton: residual sum, normalising and casting in one pass over memory.

Under autocast, PyTorch casts a layer norm's input to float32, writes float32, and casts that for
the next product. Here a row is read once, and written once in each dtype that something reads.
Statistics and sums are float32 (float64 of float64), over the rows as they are written.

Bytes per element of a residual sum (float32 + bfloat16), its norm and the cast, read and written:
24 by PyTorch's operations (sum 10, norm 8, cast 6), 12 here. Backward 44 (cast 6, norm 12 and 8 for
its weights, sum 12, cast 6), 16 here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ELEMENTS = 2048
"""Elements of a program's block of rows: with 4 warps 16 a thread, four loads of 16 bytes each."""

WARPS = 4
"""Warps in forward: 16 values a thread take about 64 registers."""

BACKWARD_WARPS = 8
"""Warps in backward, whose threads hold gradients and two sums besides."""

PROGRAMS = 512
"""Programs in backward, each with one row of partial sums: about four for each of 132 processors.
It is fixed, so that sums are the same on every card."""


@triton.jit(do_not_specialize=["rows", "tokens", "positions"])
def norm_rows(
    x,
    delta,
    gain,
    position,
    weight,
    bias,
    total,
    full,
    low,
    query,
    mean,
    rstd,
    rows,
    tokens,
    positions,
    EPS: tl.constexpr,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Normalises (rows, DIM); each optional pointer is None where nobody asks for it."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    in_rows, in_dim = row < rows, column < DIM
    inside = in_rows[:, None] & in_dim[None, :]
    at = row[:, None] * DIM + column[None, :]
    value = tl.load(x + at, inside, other=0.0).to(ACC)
    if delta is not None:
        branch = tl.load(delta + at, inside, other=0.0).to(ACC)
        if gain is not None:
            factor = tl.load(gain + row // tokens, in_rows, other=0.0).to(ACC)
            branch = branch * factor[:, None]
        value = value + branch
    if total is not None:
        written = value.to(total.dtype.element_ty)
        tl.store(total + at, written, inside)
        value = written.to(ACC)
    centre = tl.sum(value, 1) / DIM
    centred = tl.where(inside, value - centre[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / DIM + EPS)
    if mean is not None:
        tl.store(mean + row, centre, in_rows)
        tl.store(rstd + row, scale, in_rows)
    w = tl.load(weight + column, in_dim, other=0.0).to(ACC)
    b = tl.load(bias + column, in_dim, other=0.0).to(ACC)
    out = centred * scale[:, None] * w[None, :] + b[None, :]
    tl.store(full + at, out.to(full.dtype.element_ty), inside)
    if low is not None:
        tl.store(low + at, out.to(low.dtype.element_ty), inside)
    if query is not None:
        place = (row % positions)[:, None] * DIM + column[None, :]
        out = out + tl.load(position + place, inside, other=0.0).to(ACC)
        tl.store(query + at, out.to(query.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "tokens"])
def norm_rows_backward(
    grad_total,
    grad_full,
    grad_low,
    grad_query,
    total,
    gain,
    weight,
    mean,
    rstd,
    grad_x,
    grad_delta,
    partial,
    rows,
    tokens,
    DIM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Writes gradients of x and delta, and a program's sums of those of weight and bias.

    ``partial`` is (2, programs, DIM), weight first. At least one gradient of the normalised rows
    is there.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK_DIM)
    in_dim = column < DIM
    w = tl.load(weight + column, in_dim, other=0.0).to(ACC)
    weight_sum = tl.zeros((BLOCK_ROWS, BLOCK_DIM), ACC)
    bias_sum = tl.zeros((BLOCK_ROWS, BLOCK_DIM), ACC)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), programs):
        row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        in_rows = row < rows
        inside = in_rows[:, None] & in_dim[None, :]
        at = row[:, None] * DIM + column[None, :]
        grad = tl.zeros((BLOCK_ROWS, BLOCK_DIM), ACC)
        if grad_full is not None:
            grad += tl.load(grad_full + at, inside, other=0.0).to(ACC)
        if grad_low is not None:
            grad += tl.load(grad_low + at, inside, other=0.0).to(ACC)
        if grad_query is not None:
            grad += tl.load(grad_query + at, inside, other=0.0).to(ACC)
        value = tl.load(total + at, inside, other=0.0).to(ACC)
        centre = tl.load(mean + row, in_rows, other=0.0)[:, None]
        scale = tl.load(rstd + row, in_rows, other=0.0)[:, None]
        unit = tl.where(inside, (value - centre) * scale, 0.0)
        weight_sum += grad * unit
        bias_sum += grad
        scaled = grad * w[None, :]
        along = tl.sum(scaled * unit, 1) / DIM
        level = tl.sum(scaled, 1) / DIM
        out = (scaled - unit * along[:, None] - level[:, None]) * scale
        if grad_total is not None:
            out += tl.load(grad_total + at, inside, other=0.0).to(ACC)
        tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), inside)
        if grad_delta is not None:
            if gain is not None:
                factor = tl.load(gain + row // tokens, in_rows, other=0.0).to(ACC)
                out = out * factor[:, None]
            tl.store(grad_delta + at, out.to(grad_delta.dtype.element_ty), inside)
    if partial is not None:
        place = partial + program.to(tl.int64) * DIM + column
        tl.store(place, tl.sum(weight_sum, 0), in_dim)
        place += programs.to(tl.int64) * DIM
        tl.store(place, tl.sum(bias_sum, 0), in_dim)


class _Wanted(NamedTuple):
    """Which outputs a norm writes: the sum, and normalised rows in each dtype that is not None.

    ``learns`` is whether gradients may be asked for; a function's own forward pass cannot see it.
    """

    learns: bool
    full: torch.dtype
    low: torch.dtype | None = None
    total: bool = False


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _blocks(dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"BLOCK_ROWS": max(1, ELEMENTS // block), "BLOCK_DIM": block}


class _Norm(torch.autograd.Function):
    """Normalises x (+ gain * delta); returns (total, full, low, query), None where not wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        gain: Tensor | None,
        position: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        wanted: _Wanted,
    ) -> tuple[Tensor | None, ...]:
        x = x.contiguous()
        delta = None if delta is None else delta.contiguous()
        position = None if position is None else position.contiguous()
        dim, rows = x.shape[-1], x.numel() // x.shape[-1]
        tokens = x.shape[1:-1].numel()
        learns = wanted.learns and any(ctx.needs_input_grad)
        total = None
        if delta is not None and (wanted.total or learns):
            total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, delta.dtype))
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, rstd = x.new_empty((2, rows), dtype=acc) if learns else (None, None)
        full = torch.empty_like(x, dtype=wanted.full)
        low = None if wanted.low is None else torch.empty_like(x, dtype=wanted.low)
        query = None
        if position is not None:
            query = torch.empty_like(x, dtype=wanted.low or wanted.full)
        if rows:
            blocks = _blocks(dim)
            with torch.cuda.device_of(x):
                norm_rows[(triton.cdiv(rows, blocks["BLOCK_ROWS"]),)](
                    x,
                    delta,
                    gain,
                    position,
                    weight,
                    bias,
                    total,
                    full,
                    low,
                    query,
                    mean,
                    rstd,
                    rows,
                    tokens,
                    1 if position is None else position.numel() // dim,
                    EPS=eps,
                    DIM=dim,
                    ACC=_accumulator(x.dtype),
                    num_warps=WARPS,
                    **blocks,
                )
        if learns:
            ctx.save_for_backward(x if total is None else total, gain, weight, mean, rstd)
            ctx.dtypes = x.dtype, None if delta is None else delta.dtype
            ctx.position = None if position is None else (position.shape, position.dtype)
            ctx.tokens = tokens
            ctx.set_materialize_grads(False)
        return total if wanted.total else None, full, low, query

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, gain, weight, mean, rstd = ctx.saved_tensors
        learns_x, learns_delta, _, learns_position, *learns_affine = ctx.needs_input_grad[:6]
        grads = tuple(None if grad is None else grad.contiguous() for grad in grads)
        dim, rows = total.shape[-1], mean.numel()
        x_dtype, delta_dtype = ctx.dtypes
        grad_x = torch.empty_like(total, dtype=x_dtype)
        grad_delta = grad_x
        if learns_delta and (gain is not None or delta_dtype != x_dtype):
            grad_delta = torch.empty_like(total, dtype=delta_dtype)
        blocks = _blocks(dim)
        programs = min(PROGRAMS, triton.cdiv(rows, blocks["BLOCK_ROWS"]))
        partial = None
        if any(learns_affine):
            partial = total.new_empty((2, programs, dim), dtype=mean.dtype)
        if all(grad is None for grad in grads[1:]):  # only the sum was used
            grads = (grads[0], torch.zeros_like(total), None, None)
        if rows:
            norm_rows_backward[(programs,)](
                *grads,
                total,
                gain,
                weight,
                mean,
                rstd,
                grad_x,
                None if grad_delta is grad_x else grad_delta,
                partial,
                rows,
                ctx.tokens,
                DIM=dim,
                ACC=_accumulator(total.dtype),
                num_warps=BACKWARD_WARPS,
                **blocks,
            )
        grad_position = None
        if learns_position and grads[3] is not None:
            shape, dtype = ctx.position
            over = grads[3].view(-1, *shape)
            # A sum in float32 is one pass over the gradient; its result is as small as one image.
            grad_position = over.sum(0, dtype=mean.dtype).to(dtype)
        affine = (None, None)
        if partial is not None:
            affine = partial.sum(1).to(weight.dtype).unbind(0)
        return (
            grad_x if learns_x else None,
            grad_delta if learns_delta else None,
            None,
            grad_position,
            *affine,
            None,
            None,
        )


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that products take x in: autocast's where it is on, else x's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def full_dtype(x: Tensor, delta: Tensor | None = None) -> torch.dtype:
    """Returns the dtype that PyTorch's layer norm gives: float32 at least under autocast."""
    dtype = x.dtype if delta is None else torch.promote_types(x.dtype, delta.dtype)
    if torch.is_autocast_enabled(x.device.type):
        return torch.promote_types(dtype, torch.float32)
    return dtype


def layer_norm(x: Tensor, norm: nn.LayerNorm, *, for_products: bool = True) -> Tensor:
    """Returns x normalised over its last dimension, in the dtype of the next product.

    Args:
        x: (B, ..., C).
        norm: over C, with weight and bias.
        for_products: False gives the dtype of PyTorch's layer norm.
    """
    dtype = full_dtype(x)
    if for_products and torch.is_autocast_enabled(x.device.type):
        dtype = product_dtype(x)
    wanted = _Wanted(torch.is_grad_enabled(), dtype)
    return _Norm.apply(x, None, None, None, norm.weight, norm.bias, norm.eps, wanted)[1]


def add_layer_norm(
    x: Tensor, delta: Tensor, norm: nn.LayerNorm, *, gain: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns x + gain * delta, and that normalised, in the dtype of the next product.

    Args:
        x: (B, ..., C), the residual stream.
        delta: of the same shape; the sum has the wider dtype of the two.
        norm: over C, with weight and bias.
        gain: (B,) factors of the images' deltas, as stochastic depth draws them, or None.
    """
    dtype = full_dtype(x, delta)
    if torch.is_autocast_enabled(x.device.type):
        dtype = product_dtype(x)
    wanted = _Wanted(torch.is_grad_enabled(), dtype, total=True)
    total, out, _, _ = _Norm.apply(x, delta, gain, None, norm.weight, norm.bias, norm.eps, wanted)
    return total, out


class Normed(NamedTuple):
    """A normalised sum for whatever reads it.

    Attributes:
        full: for the next residual sum, float32 under autocast.
        low: for products, in autocast's dtype; the same tensor as ``full`` without autocast.
        query: the sum of it and a position, for products; None without a position.
    """

    full: Tensor
    low: Tensor
    query: Tensor | None


def norm_of_sum(
    x: Tensor, delta: Tensor, norm: nn.LayerNorm, position: Tensor | None = None
) -> Normed:
    """Returns norm(x + delta) for a residual stream that is normalised after each sum.

    Args:
        x, delta: (B, ..., C).
        norm: over C, with weight and bias.
        position: (..., C) or (B, ..., C), which the query adds; None gives no query.
    """
    dtype, low = full_dtype(x, delta), product_dtype(x)
    wanted = _Wanted(torch.is_grad_enabled(), dtype, None if low == dtype else low)
    _, full, cast, query = _Norm.apply(
        x, delta, None, position, norm.weight, norm.bias, norm.eps, wanted
    )
    return Normed(full, full if cast is None else cast, query)
