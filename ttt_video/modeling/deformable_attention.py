"""Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159), without a compiler.

A CPU runs loops that Numba compiles, and a GPU runs Triton's kernels (:mod:`.kernels.deformable`).
Other devices run PyTorch's ``grid_sample``, or the package ``torch-ms-deform-attn`` where it is
installed and was built for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from functools import cache, reduce
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .kernels import is_large_on_cpu, run_linear, use_kernels
from .tables import is_exporting, shared_table

Shapes = tuple[tuple[int, int], ...]

COMPILED = "torch_ms_deform_attn"
"""Module of the compiled package."""


def deformable_attention(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Returns the weighted sum of values at points of several levels, read bilinearly.

    Args:
        value: (B, S, M, D) for M heads; S is the sum of height * width over the levels.
        shapes: (height, width) of each of the L levels.
        locations: (B, Q, M, L, P, 2) points (x, y); 0..1 spans a level from edge to edge, and
            outside of it all values are zero.
        weights: (B, Q, M, L, P) attention weights.

    Returns:
        (B, Q, M * D).
    """
    if value.device.type == "cpu" and not is_exporting():
        from .deformable_cpu import attend  # a GPU needs no Numba

        return attend(value, [*chain(*shapes)], locations, weights).flatten(2)
    return sampled_attention(value, shapes, locations, weights)


def sampled_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """:func:`deformable_attention` by ``grid_sample``, on any device."""
    batch, _, heads, dim = value.shape
    queries = locations.shape[1]
    levels = value.split([h * w for h, w in shapes], dim=1)
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # (L, B*M, P, Q, 2)
    gains = weights.permute(3, 0, 2, 4, 1).flatten(1, 2)  # (L, B*M, P, Q)
    sums = []
    for level, (height, width), grid, gain in zip(levels, shapes, grids, gains, strict=True):
        maps = level.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        sampled = F.grid_sample(maps, grid, "bilinear", "zeros", align_corners=False)
        sum_up = _SumOverPoints.apply if torch.is_grad_enabled() else _sum_over_points
        sums.append(sum_up(sampled, gain))
    return reduce(torch.add, sums).view(batch, heads * dim, queries).transpose(1, 2)


class _SumOverPoints(torch.autograd.Function):
    """Multiplies (N, D, P, Q) samples by (N, P, Q) weights and sums over P: (N, D, Q).

    It goes point by point, so that no product as large as the samples is written to memory.
    """

    @staticmethod
    def forward(ctx: Any, samples: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(samples, weights)
        return _sum_over_points(samples, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        samples, weights = ctx.saved_tensors
        grad = grad.contiguous()  # strided products would be copied
        points = range(weights.shape[1])
        grad_weights = torch.stack([(samples[:, :, p] * grad).sum(1) for p in points], 1)
        return grad.unsqueeze(2) * weights.unsqueeze(1), grad_weights


def _sum_over_points(samples: Tensor, weights: Tensor) -> Tensor:
    out = samples[:, :, 0] * weights[:, None, 0]
    for point in range(1, weights.shape[1]):
        out.addcmul_(samples[:, :, point], weights[:, None, point])
    return out


def compiled_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """:func:`deformable_attention` by the compiled package."""
    compiled = importlib.import_module(COMPILED)
    sizes = torch.tensor(shapes, device=value.device)
    areas = sizes.prod(1)
    return compiled.ms_deform_attn(
        value.contiguous(),
        sizes,
        areas.cumsum(0) - areas,
        locations.contiguous(),
        weights.contiguous(),
    )


@cache
def attention_function(device_type: str) -> Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]:
    """Returns the fastest implementation on a device type ("cpu", "cuda"), tried once.

    Our kernels come before it, where they run. On a CPU the package's loops are slower than ours.
    """
    if device_type == "cpu" or importlib.util.find_spec(COMPILED) is None:
        return deformable_attention
    value = torch.ones(1, 1, 1, 1, device=device_type)
    samples = torch.full((1, 1, 1, 1, 1, 2), 0.5, device=device_type)
    try:
        compiled_attention(value, ((1, 1),), samples, samples[..., 0])
    except (RuntimeError, NotImplementedError):  # a build without kernels for this device
        return deformable_attention
    except (ImportError, OSError) as error:  # a build for another version of torch
        warnings.warn(
            f"torch-ms-deform-attn is installed but does not import ({error}); the slower "
            "grid_sample is used. Build it again for this torch, or uninstall it.",
            stacklevel=2,
        )
        return deformable_attention
    return compiled_attention


@shared_table(64)
def _widths_and_heights(
    shapes: Shapes, points: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Returns width and height of each level, once for each of its points: (2 L P,).

    It is shared, because a copy to a GPU waits for all work before it; callers must not write to
    it. A CPU divides by it in a third of the time that broadcasting pairs takes.
    """
    if is_exporting():  # sizes may be symbols, which torch.tensor does not take
        sides = [side for height, width in shapes for side in (width, height)]
        numbers = [torch.scalar_tensor(side, dtype=dtype, device=device) for side in sides]
        return torch.stack(numbers).view(-1, 1, 2).expand(-1, points, -1).flatten()
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=dtype, device=device)
    return sizes.repeat_interleave(points, dim=0).flatten()


class MSDeformAttn(nn.Module):
    """Deformable attention over several feature levels, with Mask2Former's parameter names."""

    def __init__(self, dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        """``dim`` must be a multiple of ``num_heads``."""
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, 2 * samples)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self._init_weights()

    def _init_weights(self) -> None:
        # Each head starts out looking in one of evenly spread directions, point p at p + 1 px.
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, self.num_points + 1)
        bias = directions[:, None, None, :] * steps[None, None, :, None]
        bias = bias.expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference: Tensor, value: Tensor, shapes: Shapes) -> Tensor:
        """Attends from each query to points around its reference on every level.

        Args:
            query: (B, Q, C).
            reference: (Q, 2) normalised (x, y) of each query.
            value: (B, S, C), all levels flattened one after the other.
            shapes: (height, width) of each level.

        Returns:
            (B, Q, C).
        """
        batch, queries, _ = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        values = run_linear(self.value_proj, value).view(batch, value.shape[1], heads, -1)
        logits = run_linear(self.attention_weights, query)
        offsets = run_linear(self.sampling_offsets, query)
        if use_kernels(values):
            from .kernels import deformable  # it needs Triton

            out = deformable.attend(values, shapes, reference, offsets, logits)
            return run_linear(self.output_proj, out)
        weights = logits.view(-1, levels * points)
        if is_large_on_cpu(query, self.value_proj.weight):
            # Along rows of 12 it takes five times as long.
            weights = weights.t().softmax(0).t().contiguous()
        else:
            weights = weights.softmax(-1)
        weights = weights.view(batch, queries, heads, levels, points)
        # Offsets are in pixels of their level. Positions stay in float32 under autocast: bfloat16
        # resolves 1/256 of the image, which is several pixels.
        offsets = offsets.view(batch, queries, heads, -1)
        places = reference.repeat(1, levels * points)[:, None]
        sizes = _widths_and_heights(shapes, points, reference.dtype, query.device)
        locations = places + offsets.to(reference.dtype) / sizes
        locations = locations.view(batch, queries, heads, levels, points, 2)
        attend = attention_function(query.device.type)
        out = attend(values.to(locations.dtype), shapes, locations, weights.to(locations.dtype))
        return run_linear(self.output_proj, out)
