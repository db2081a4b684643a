"""Corrects the statistics of normalisation layers within the prediction itself.

It is LN Adapt's correction (:mod:`.ln_adapt`) of a single frame without a pass of its own: each
layer is measured and corrected when the prediction reaches it, so that later layers see what they
will get. It remembers nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm_statistics import BATCH_NORMS, Statistics, hooked


class NormCorrection:
    """Gives channels of normalisation layers a share of the source's mean and variance back."""

    def __init__(self, layers: Mapping[str, nn.Module], source: Mapping[str, Statistics]) -> None:
        """
        Args:
            layers: of :func:`norm_layers`.
            source: their statistics on training images (:func:`fit_statistics`).
        """
        self.layers, self.source = layers, source

    @contextmanager
    def correcting(self, share: float) -> Iterator[None]:
        """Corrects the layers in the forward pass within.

        The frame's statistics have ``share``, in [0, 1], in those that a layer standardises with,
        and the source's have the rest. 0 corrects nothing.
        """
        if not share:
            yield
            return

        def correct(name: str, layer: nn.Module, x: Tensor) -> Tensor:
            return self._corrected(name, layer, x, share)

        with hooked(self.layers, correct):
            yield

    def _corrected(self, name: str, layer: Any, x: Tensor, share: float) -> Tensor:
        """Returns the layer's output with corrected statistics."""
        plain, axis = _standardised(layer, x)
        others = [i for i in range(x.ndim) if i != axis]
        own_variance, own_mean = torch.var_mean(plain.float(), others, correction=0)
        source = self.source[name]
        mean = torch.lerp(source.mean, own_mean, share)
        variance = torch.lerp(source.variance, own_variance, share)
        if isinstance(layer, BATCH_NORMS):
            factor = layer.weight / (variance + layer.eps).sqrt()
            shift = layer.bias - mean * factor
        else:
            ratio = ((source.variance + 1e-5) / (variance + 1e-5)).sqrt()
            factor = layer.weight * ratio
            shift = layer.bias + layer.weight * (source.mean - mean * ratio)
        shape = [-1 if i == axis else 1 for i in range(plain.ndim)]
        return torch.addcmul(shift.view(shape), plain, factor.view(shape))


def _standardised(layer: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Returns what a layer's scale and shift, or running statistics, apply to; and its axis."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps), x.ndim - 1
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, eps=layer.eps), 1
    return x, 1
