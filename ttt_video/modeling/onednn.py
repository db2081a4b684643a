"""Matrix products on CPUs with AVX-512 by oneDNN, which PyTorch has on board.

PyTorch gives products of float32 to MKL, which is slower on AMD's CPUs
(docs/log/2026-11-28-cpu-bar-epyc.md). Its compiler calls the same operator.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tables import is_exporting

LEAST, LEAST_SIDE = 1 << 25, 96
"""Multiply-adds, and channels in and out, from which a product is oneDNN's.

Smaller ones gain nothing, and the shipped small models keep their numbers.
"""


def runs_onednn(x: Tensor, weight: Tensor) -> bool:
    """Returns whether a product of float32 on a CPU is large enough and oneDNN is there for it."""
    # Before any size: a program that is being written must not depend on one.
    if is_exporting() or torch.compiler.is_compiling():
        return False
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.dim() > 1
        and x.numel() * len(weight) >= LEAST
        and min(weight.shape) >= LEAST_SIDE
        and not torch.is_autocast_enabled("cpu")
        and _is_there()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> Tensor:
    """Returns ``F.linear(x, weight, bias)`` of float32 on a CPU, or ReLU of it.

    The sums are in another order than MKL's, so that numbers differ by rounding. It is (..., D)
    from (..., C).
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Linear.apply(x, weight, bias, relu)
    return _product(x, weight, bias, relu)


@cache
def _is_there() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    then = "relu" if relu else "none"
    bias = None if bias is None else bias.contiguous()  # it is read as if it were
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")


class _Linear(torch.autograd.Function):
    """``F.linear``, or ReLU of it; the gradient of the weight is MKL's, which is as fast there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        out = _product(x, weight, bias, relu)
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        if out is not None:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t(), None) if of_x else None,
            rows.t() @ x.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
            None,
        )
