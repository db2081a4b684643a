"""Maps that queries are compared with, before or after their last convolution of one pixel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Unprojected(NamedTuple):
    """Mask features that still lack a convolution of one pixel, which the queries can go through.

    There are some hundred queries and thousands of pixels, and q (W x) = (q W) x.
    """

    maps: Tensor  # (B, C, H, W)
    projection: nn.Conv2d  # to the channels of the queries


MaskFeatures = Tensor | Unprojected


def mask_logits(queries: Tensor, features: MaskFeatures) -> Tensor:
    """Returns the products of (B, Q, D) queries with (B, D, H, W) features: (B, Q, H, W)."""
    if isinstance(features, Tensor):
        return torch.einsum("bqc,bchw->bqhw", queries, features)
    weight, bias = features.projection.weight.flatten(1), features.projection.bias
    pixels = features.maps.flatten(2)
    if bias is None:
        masks = torch.bmm(queries @ weight, pixels)
    else:
        masks = torch.baddbmm((queries @ bias)[..., None], queries @ weight, pixels)
    return masks.unflatten(2, features.maps.shape[2:])
