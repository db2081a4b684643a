"""Group normalisation of channels-last tokens by the kernels of :mod:`.group_norms`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import group_norms as kernels

Size = tuple[int, int]
"""Height and width."""


class _Map(NamedTuple):
    """How a group norm is done.

    Attributes:
        size: of the map; coarse: of the coarser map that is added, if there is one.
        groups, eps: of the norm; relu: whether one follows.
        dtype: of the output.
    """

    size: Size
    coarse: Size
    groups: int
    eps: float
    relu: bool
    dtype: torch.dtype


def _sizes(dim: int, dtype: torch.dtype) -> dict[str, Any]:
    block = triton.next_power_of_2(dim)
    return {
        "DIM": dim,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK_ROWS": max(1, kernels.ELEMENTS // block),
        "BLOCK_DIM": block,
        "num_warps": kernels.WARPS,
    }


class _GroupNorm(torch.autograd.Function):
    """Normalises (B, H W, C) tokens, then applies a ReLU or adds an enlarged coarser map."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, coarse: Tensor | None, how: _Map
    ) -> Tensor:
        x = x.contiguous()
        coarse = None if coarse is None else coarse.contiguous()
        batch, tokens, dim = x.shape
        group = dim // how.groups
        sizes = _sizes(dim, x.dtype)
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = sizes["BLOCK_ROWS"]
        count = _parts(batch, tokens, rows)
        parts = x.new_empty((batch, count, 2, dim), dtype=acc)
        mean, rstd = x.new_empty((2, batch, how.groups), dtype=acc)
        out = torch.empty_like(x, dtype=how.dtype)
        kernels.part_statistics[(batch, count)](x, parts, tokens, **sizes)
        block_parts, block_group = triton.next_power_of_2(count), triton.next_power_of_2(group)
        block_groups = max(1, kernels.MERGED // (block_parts * block_group))
        block_groups = min(block_groups, triton.next_power_of_2(how.groups))
        kernels.group_statistics[(batch, triton.cdiv(how.groups, block_groups))](
            parts,
            mean,
            rstd,
            tokens,
            count,
            EPS=how.eps,
            DIM=dim,
            GROUP=group,
            ACC=sizes["ACC"],
            BLOCK_ROWS=rows,
            BLOCK_PARTS=block_parts,
            BLOCK_GROUPS=block_groups,
            BLOCK_GROUP=block_group,
        )
        kernels.normalise[(triton.cdiv(tokens, rows), batch)](
            x,
            mean,
            rstd,
            weight,
            bias,
            coarse,
            out,
            *how.size,
            *how.coarse,
            RELU=how.relu,
            GROUP=group,
            **sizes,
        )
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, weight, bias, mean, rstd)
            ctx.how = how
            ctx.coarse_dtype = None if coarse is None else coarse.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        how: _Map = ctx.how
        grad = grad.contiguous()
        batch, tokens, dim = x.shape
        group = dim // how.groups
        sizes = _sizes(dim, x.dtype)
        rows = sizes["BLOCK_ROWS"]
        count = _parts(batch, tokens, rows)
        parts = x.new_empty((2, batch, count, dim), dtype=mean.dtype)
        given = grad, x, mean, rstd, weight, bias
        constants = {"RELU": how.relu, "GROUP": group, **sizes}
        kernels.part_gradients[(batch, count)](*given, parts, tokens, **constants)
        sums = parts.sum(2)
        shares = (sums * weight.to(sums.dtype)).view(2, batch, how.groups, group)
        along, level = shares.sum(-1).div_(tokens * group)
        grad_x = torch.empty_like(x)
        blocks = triton.cdiv(tokens, rows)
        kernels.input_gradients[(blocks, batch)](*given, along, level, grad_x, tokens, **constants)
        grad_coarse = None
        if ctx.coarse_dtype is not None and ctx.needs_input_grad[3]:
            grad_coarse = _enlarged_backward(grad, how, ctx.coarse_dtype)
        grad_weight, grad_bias = sums.sum(1).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, grad_coarse, None


def _parts(batch: int, tokens: int, rows: int) -> int:
    """Returns the number of parts that an image's blocks of rows are summed in."""
    return max(1, min(kernels.PARTS // max(batch, 1), triton.cdiv(tokens, rows)))


def _enlarged_backward(grad: Tensor, how: _Map, dtype: torch.dtype) -> Tensor:
    """Returns the gradient of the coarser map, of that of the enlarged one."""
    batch, _, dim = grad.shape
    (height, width), (coarse_height, coarse_width) = how.size, how.coarse
    out = grad.new_empty((batch, coarse_height * coarse_width, dim), dtype=dtype)
    sizes = _sizes(dim, grad.dtype)
    blocks = triton.cdiv(coarse_height * coarse_width, sizes["BLOCK_ROWS"])
    # Two coarse cells' width of fine cells; one more on either side, as the first is rounded.
    kernels.coarse_gradients[(blocks, batch)](
        grad,
        out,
        height,
        width,
        coarse_height,
        coarse_width,
        TALL=triton.cdiv(2 * height, coarse_height) + 2,
        WIDE=triton.cdiv(2 * width, coarse_width) + 2,
        **sizes,
    )
    return out


def group_norm(
    x: Tensor,
    norm: nn.GroupNorm,
    size: Size,
    *,
    dtype: torch.dtype,
    relu: bool = False,
    coarse: tuple[Tensor, Size] | None = None,
) -> Tensor:
    """Returns a normalised map, after a ReLU or the sum with a coarser map.

    Args:
        x: (B, H * W, C) tokens, channels innermost.
        norm: over C, with weight and bias.
        size: H and W.
        dtype: of the result.
        relu: whether one follows.
        coarse: (B, h * w, C) tokens with h and w, enlarged as ``F.interpolate`` does bilinearly
            (``align_corners=False``) and added.
    """
    tokens, coarse_size = (None, (1, 1)) if coarse is None else coarse
    how = _Map(size, coarse_size, norm.num_groups, norm.eps, relu, dtype)
    with torch.cuda.device_of(x):
        return _GroupNorm.apply(x, norm.weight, norm.bias, tokens, how)
