"""Measures deformable attention by itself, beside Deformable DETR's plain reference."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode

from costs.comparison import OURS, Options, compare, difference
from ttt_video.errors import UserError
from ttt_video.modeling.deformable_attention import COMPILED, attention_function, compiled_attention

REFERENCE = "reference"


def attention(cfg: CfgNode, options: Options) -> dict[str, Any]:
    """Measures one layer's sampling and summing, forward and with backward, in float32.

    The shapes are those of the pixel decoder's encoder for images of the given sizes; the points
    lie some pixels around their query, as a trained layer's do. On a CPU the compiled package is
    another peer if it is installed.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    ours = attention_function(device.type)
    functions: dict[str, Any] = {OURS: ours}
    if options.peers:
        try:
            from transformers.models.mask2former import modeling_mask2former
        except ImportError as error:
            raise UserError(
                "the reference is Hugging Face's: pip install 'transformers>=5.20,<6', or add "
                "--no-peers"
            ) from error
        functions[REFERENCE] = modeling_mask2former.multi_scale_deformable_attention
        if device.type == "cpu" and importlib.util.find_spec(COMPILED) is not None:
            functions[COMPILED] = compiled_attention
    heads = cfg.MODEL.MASK_FORMER.NHEADS
    points = cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS
    dim = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM // heads
    cases = []
    for case in replace(options, precisions=("fp32",)).cases():
        height, width = case["size"]
        shapes = tuple((math.ceil(height / s), math.ceil(width / s)) for s in (32, 16, 8))
        values = _values(case["batch"], shapes, heads, points, dim, device)

        def forward(function: Any, shapes: Any = shapes, values: Any = values) -> Any:
            value, locations, weights = values
            return function(value, shapes, locations, weights)

        def both(function: Any, forward: Any = forward, values: Any = values) -> Any:
            return torch.autograd.grad(forward(function).sum(), values)

        case["values"] = list(values[0].shape)
        if options.peers:
            outputs = ("output", "values", "locations", "weights")
            case["difference"] = {
                f"{who}, {name}": difference(a, b, f"{who}: {name} or its gradient")
                for who, peer in functions.items()
                if who != OURS
                for name, a, b in zip(
                    outputs, [forward(ours), *both(ours)], [forward(peer), *both(peer)], strict=True
                )
            }

        def no_grad(function: Any, forward: Any = forward) -> Any:
            with torch.no_grad():
                return forward(function)

        for name, work in (("forward", no_grad), ("forward_backward", both)):
            works = {who: lambda f=f, work=work: work(f) for who, f in functions.items()}
            cases.append({**case, "pass": name, **compare(works, device, options)})
    return {"implementation": ours.__name__, "cases": cases}


def _values(
    batch: int,
    shapes: tuple[tuple[int, int], ...],
    heads: int,
    points: int,
    dim: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns values, sampling points near each query's own place, and weights."""
    torch.manual_seed(0)
    steps = [((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
    places = torch.cat([torch.cartesian_prod(y, x).flip(-1) for y, x in steps])  # (Q, 2): x, y
    queries, levels = len(places), len(shapes)
    sizes = torch.tensor([(w, h) for h, w in shapes])[:, None]
    offsets = 2 * torch.randn(batch, queries, heads, levels, points, 2) / sizes
    locations = places[:, None, None, None] + offsets
    value = torch.randn(batch, queries, heads, dim)
    weights = torch.rand(batch, queries, heads, levels, points)
    weights = weights / weights.sum((-1, -2), keepdim=True)
    value, locations, weights = (t.to(device).requires_grad_() for t in (value, locations, weights))
    return value, locations, weights
