"""Corrects the statistics of normalisation layers within the prediction itself.

It is LN Adapt's correction (:mod:`.ln_adapt`) of a single frame without a pass of its own: each
layer is measured and corrected when the prediction reaches it, so that later layers see what they
will get. It remembers nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .norm_statistics import BATCH_NORMS, Statistics, hooked

SMALL = 1e-3
"""Channels whose scale is smaller than that say nothing."""


class _Constants(NamedTuple):
    """Constants of a layer y = w z + b for a share, (C,) each.

    With mean M and variance V of y over a frame, the corrected output is
    r y + target - r (offset + share M), where r = sqrt(spread / (base + slope V)).
    """

    spread: Tensor
    base: Tensor
    slope: Tensor
    share: Tensor
    offset: Tensor
    target: Tensor


class NormCorrection:
    """Gives channels of normalisation layers a share of the source's mean and variance back."""

    def __init__(self, layers: Mapping[str, nn.Module], source: Mapping[str, Statistics]) -> None:
        """
        Args:
            layers: of :func:`norm_layers`.
            source: their statistics on training images (:func:`fit_statistics`).
        """
        self.layers, self.source = layers, source
        self._known: dict[str, tuple[tuple, _Constants, tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def correcting(self, share: float) -> Iterator[None]:
        """Corrects the layers in the forward pass within.

        The frame's statistics have ``share``, in [0, 1], in those that a layer standardises with,
        and the source's have the rest. 0 corrects nothing.
        """
        if not share:
            yield
            return

        def correct(name: str, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
            if isinstance(layer, BATCH_NORMS):
                return self._of_batch(name, layer, x, share)
            return self._of_each(name, layer, out, share)

        with hooked(self.layers, correct):
            yield

    def _of_each(self, name: str, layer: Any, out: Tensor, share: float) -> Tensor:
        """Returns the corrected output of a layer or group normalisation.

        Statistics are those of what its scale and shift apply to, which its output tells. A channel
        with next to no scale stays as it is.
        """
        axis = out.ndim - 1 if isinstance(layer, nn.LayerNorm) else 1
        variance, mean = _channels(out, axis)
        own = self._constants(name, layer, share)
        ratio = (own.spread / torch.addcmul(own.base, own.slope, variance)).sqrt_()
        centre = torch.addcmul(own.offset, own.share, mean)
        return _affine(out, axis, ratio, torch.addcmul(own.target, ratio, centre, value=-1))

    def _constants(self, name: str, layer: Any, share: float) -> _Constants:
        """Returns what the correction of a layer takes that is the same in every frame."""
        weight, bias = layer.weight, layer.bias
        # By identity: a prediction with the source's weights puts other tensors in their place.
        key = (id(weight), weight._version, id(bias), bias._version, share)
        known = self._known.get(name)
        if known is not None and known[0] == key:
            return known[1]
        source = self.source[name]
        says = weight.abs() > SMALL
        own = torch.where(says, share, 0.0)
        kept = weight * (1 - own) * source.mean
        constants = _Constants(
            spread=source.variance + 1e-5,
            base=(1 - own) * source.variance + 1e-5,
            slope=torch.where(says, own / weight**2, 0.0),
            share=own,
            offset=(1 - own) * bias + kept,
            target=bias + weight * source.mean,
        )
        self._known[name] = (key, constants, (weight, bias))  # an id is a living tensor's
        return constants

    def _of_batch(self, name: str, layer: Any, x: Tensor, share: float) -> Tensor:
        """Returns the output of a batch normalisation with corrected running statistics."""
        variance, mean = _channels(x, 1)
        source = self.source[name]
        factor = layer.weight / (torch.lerp(source.variance, variance, share) + layer.eps).sqrt()
        return _affine(x, 1, factor, layer.bias - torch.lerp(source.mean, mean, share) * factor)


def _channels(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Returns the variance and mean of each channel; on the CPU faster than ``torch.var_mean``."""
    others, x = [i for i in range(x.ndim) if i != axis], x.float()
    mean = x.mean(others)
    return (x.square().mean(others) - mean.square()).clamp_min(0), mean


def _affine(x: Tensor, axis: int, factor: Tensor, shift: Tensor) -> Tensor:
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    return torch.addcmul(shift.view(shape), x, factor.view(shape))
