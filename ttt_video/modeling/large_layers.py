"""Large layers on a CPU: which are large, and their products in float32.

With AVX-512 the products are oneDNN's, which PyTorch has on board and its compiler calls, too.
PyTorch itself gives them to MKL, which is slower there on AMD's CPUs, and faster with AVX2
(docs/log/2026-11-28-cpu-bar-epyc.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tables import is_exporting

LEAST, LEAST_SIDE = 1 << 25, 96
"""Multiply-adds, and channels in and out, from which a product is large.

Smaller ones gain nothing, and the shipped small models keep their numbers.
"""


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Returns whether a product is one of float32 on a CPU, and large."""
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
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> Tensor:
    """Returns ``F.linear(x, weight, bias)`` of float32 on a CPU, or ReLU of it.

    Where oneDNN computes it, numbers differ by rounding. It is (..., D) from (..., C).
    """
    if _needs_grad(x, weight, bias):
        return _Linear.apply(x, weight, bias, relu)
    return _product(x, weight, bias, relu)


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    relu: bool,
) -> Tensor:
    """Returns two layers with ReLU or else GELU between them, by :func:`linear`'s products.

    Its backward pass writes the hidden layer's gradient once, and the activation's over it.
    """
    if _needs_grad(x, weight1, bias1, weight2, bias2):
        return _Mlp.apply(x, weight1, bias1, weight2, bias2, relu)
    hidden = _product(x, weight1, bias1, relu)
    return _product(hidden if relu else F.gelu(hidden), weight2, bias2)


def _needs_grad(*tensors: Tensor | None) -> bool:
    needed = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return needed and torch.is_grad_enabled()


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _runs_onednn() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _has_onednn()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    if not _runs_onednn():
        out = F.linear(x, weight, bias)
        return out.relu_() if relu else out
    then = "relu" if relu else "none"
    bias = None if bias is None else bias.contiguous()  # it is read as if it were
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")


class _Linear(torch.autograd.Function):
    """``F.linear``, or ReLU of it; the gradient of the weight is always MKL's, which is as fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        out = _product(x, weight, bias, relu)
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        if out is not None:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        return *_gradients(grad, x, weight, ctx.needs_input_grad), None


class _Mlp(torch.autograd.Function):
    """:func:`mlp`; the gradients of the weights are as :class:`_Linear`'s."""

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
        raw = _product(x, weight1, bias1, relu)
        hidden = raw if relu else F.gelu(raw)
        ctx.save_for_backward(x, weight1, raw, hidden, weight2)
        ctx.relu = relu
        return _product(hidden, weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, raw, hidden, weight2 = ctx.saved_tensors
        first, second = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:5]
        inner, *seconds = _gradients(grad, hidden, weight2, (any(first), *second))
        if inner is None:
            return None, None, None, *seconds, None
        if ctx.relu:
            torch.ops.aten.threshold_backward.grad_input(inner, raw, 0, grad_input=inner)
        else:
            torch.ops.aten.gelu_backward.grad_input(inner, raw, grad_input=inner)
        return *_gradients(inner, x, weight1, first), *seconds, None


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of a product's input, weight and bias, those that are needed."""
    rows = grad.flatten(0, -2)
    return (
        _product(grad, weight.t(), None) if needs[0] else None,
        rows.t() @ x.flatten(0, -2) if needs[1] else None,
        rows.sum(0) if needs[2] else None,
    )
