"""Deformable attention on a CPU, as loops that Numba compiles at their first run.

They read a point's four neighbours once, forward and backward, and write nothing as large as the
samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cpu_loops import arrays_of, compiled, share_out

# Constants are float32, which keeps float32 arrays in float32 (and float64 ones in float64).
# Indices are unsigned, because Numba tests the sign of others at every access.
_ZERO, _HALF, _ONE, _FAR = (np.float32(x) for x in (0, 0.5, 1, -2))


@compiled
def _neighbours(place: Any, length: Any) -> Any:
    """Returns indices, shares and slopes of the two pixels around a place on an axis.

    The axis of ``length`` pixels spans 0..1; slopes are derivatives of the shares by ``place``. A
    pixel beyond the ends has share 0 and the index of one that can be read.
    """
    size = np.float32(length)
    position = place * size - _HALF
    inside = position if position > _FAR else _FAR
    inside = inside if inside < size else size
    below = np.floor(inside)
    low = np.int64(below)
    high = low + 1
    share = position - below
    nothing = share * _ZERO  # keeps NaN
    first, second = 0 <= low < length, 0 <= high < length
    return (
        min(max(low, 0), length - 1),
        min(max(high, 0), length - 1),
        _ONE - share if first else nothing,
        share if second else nothing,
        -size if first else _ZERO,
        size if second else _ZERO,
    )


@compiled
def _corners(x: Any, y: Any, height: Any, width: Any, base: Any, pixel: Any) -> Any:
    """Returns where the four pixels around (x, y) begin in memory, with shares and slopes by axis.

    They are upper left, upper right, lower left, lower right. The map begins at ``base``, and its
    pixels are ``pixel`` numbers apart.
    """
    left, right, x0, x1, dx0, dx1 = _neighbours(x, width)
    above, below, y0, y1, dy0, dy1 = _neighbours(y, height)
    upper, lower = base + above * width * pixel, base + below * width * pixel
    at = (
        np.uint64(upper + left * pixel),
        np.uint64(upper + right * pixel),
        np.uint64(lower + left * pixel),
        np.uint64(lower + right * pixel),
    )
    return at, (x0, x1), (y0, y1), (dx0, dx1), (dy0, dy1)


@compiled
def _forward(
    value: Any, shapes: Any, locations: Any, weights: Any, out: Any, start: Any, stop: Any
) -> None:
    """Fills ``out`` (B, Q, M, D) for the heads from ``start`` to ``stop``."""
    batch, total, heads, dim = value.shape
    _, queries, _, levels, points = weights.shape
    values = value.reshape(-1)
    pixel = heads * dim
    for b in range(batch):
        for q in range(queries):
            for m in range(start, stop):
                summed = out[b, q, m]
                summed[:] = _ZERO
                base = (b * total * heads + m) * dim
                for i in range(levels):
                    height, width = shapes[i, 0], shapes[i, 1]
                    for p in range(points):
                        x, y = locations[b, q, m, i, p, 0], locations[b, q, m, i, p, 1]
                        corners = _corners(x, y, height, width, base, pixel)
                        (at0, at1, at2, at3), (x0, x1), (y0, y1), _, _ = corners
                        y0 *= weights[b, q, m, i, p]
                        y1 *= weights[b, q, m, i, p]
                        gain0, gain1, gain2, gain3 = y0 * x0, y0 * x1, y1 * x0, y1 * x1
                        for d in range(dim):
                            e = np.uint64(d)
                            summed[d] += (gain0 * values[at0 + e] + gain1 * values[at1 + e]) + (
                                gain2 * values[at2 + e] + gain3 * values[at3 + e]
                            )
                    base += height * width * pixel


@compiled
def _backward(
    value: Any,
    shapes: Any,
    locations: Any,
    weights: Any,
    grad: Any,
    grad_value: Any,
    grad_locations: Any,
    grad_weights: Any,
    start: Any,
    stop: Any,
) -> None:
    """Adds to the zeros of ``grad_value`` and fills the other two, for the same heads."""
    batch, total, heads, dim = value.shape
    _, queries, _, levels, points = weights.shape
    values, grad_values = value.reshape(-1), grad_value.reshape(-1)
    pixel = heads * dim
    at = np.empty(4, np.uint64)
    gain, product = np.empty(4, value.dtype), np.empty(4, value.dtype)
    for b in range(batch):
        for q in range(queries):
            for m in range(start, stop):
                given = grad[b, q, m]
                base = (b * total * heads + m) * dim
                for i in range(levels):
                    height, width = shapes[i, 0], shapes[i, 1]
                    for p in range(points):
                        x, y = locations[b, q, m, i, p, 0], locations[b, q, m, i, p, 1]
                        corners = _corners(x, y, height, width, base, pixel)
                        at[:], (x0, x1), (y0, y1), (dx0, dx1), (dy0, dy1) = corners
                        weight = weights[b, q, m, i, p]
                        gain[0], gain[1] = weight * y0 * x0, weight * y0 * x1
                        gain[2], gain[3] = weight * y1 * x0, weight * y1 * x1
                        for k in range(4):
                            first, share, dot = at[k], gain[k], _ZERO
                            for d in range(dim):
                                e = first + np.uint64(d)
                                dot += values[e] * given[d]
                                grad_values[e] += share * given[d]
                            product[k] = dot
                        p0, p1, p2, p3 = product[0], product[1], product[2], product[3]
                        grad_weights[b, q, m, i, p] = y0 * (x0 * p0 + x1 * p1) + y1 * (
                            x0 * p2 + x1 * p3
                        )
                        grad_locations[b, q, m, i, p, 0] = weight * (
                            y0 * (dx0 * p0 + dx1 * p1) + y1 * (dx0 * p2 + dx1 * p3)
                        )
                        grad_locations[b, q, m, i, p, 1] = weight * (
                            x0 * (dy0 * p0 + dy1 * p2) + x1 * (dy0 * p1 + dy1 * p3)
                        )
                    base += height * width * pixel


def _shapes(sizes: Sequence[int]) -> np.ndarray:
    return np.array(sizes, np.int64).reshape(-1, 2)


@torch.library.custom_op("ttt_video::deformable_attention", mutates_args=(), device_types="cpu")
def attend(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Computes :func:`.deformable_attention.deformable_attention` in float32 or float64 on a CPU.

    Args:
        value: (B, S, M, D).
        sizes: height and width of each level in turn, 2 L numbers.
        locations: (B, Q, M, L, P, 2).
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M, D).
    """
    batch, _, heads, dim = value.shape
    out = value.new_empty(batch, locations.shape[1], heads, dim)
    value_array, *rest = arrays_of(value, locations, weights)
    share_out(_forward, heads, value_array, _shapes(sizes), *rest, out.numpy())
    return out


@torch.library.custom_op(
    "ttt_video::deformable_attention_backward", mutates_args=(), device_types="cpu"
)
def attend_backward(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of ``value``, ``locations`` and ``weights``."""
    contiguous = torch.contiguous_format
    grads = (
        torch.zeros_like(value, memory_format=contiguous),
        torch.empty_like(locations, memory_format=contiguous),
        torch.empty_like(weights, memory_format=contiguous),
    )
    value_array, *rest = arrays_of(value, locations, weights, grad)
    share_out(_backward, value.shape[2], value_array, _shapes(sizes), *rest, *arrays_of(*grads))
    return grads


@attend.register_fake
def _(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, dim = value.shape
    return value.new_empty(batch, locations.shape[1], heads, dim)


@attend_backward.register_fake
def _(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    grads = attend_backward(value, ctx.sizes, locations, weights, grad)
    return grads[0], None, grads[1], grads[2]


attend.register_autograd(_gradients, setup_context=_save)
