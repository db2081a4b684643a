"""Corrects the statistics of normalisation layers within the prediction itself.

It is LN Adapt's correction (:mod:`.ln_adapt`) without a pass of its own: each layer is measured
and corrected when the prediction reaches it, so that later layers see what they will get. A
prediction changes nothing that lasts: what it measured is a reading, which :meth:`take` keeps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm_statistics import BATCH_NORMS, Statistics, hooked

Measured = dict[str, Statistics]
"""Statistics of a frame by layer."""


class NormCorrection:
    """Gives channels of normalisation layers a share of the source's mean and variance back.

    With n frames in the window the stream's statistics have the share ``limit`` n / (``prior`` +
    n) in those that a layer standardises with, and the source's have the rest.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        source: Mapping[str, Statistics],
        *,
        prior: float,
        limit: float,
    ) -> None:
        """
        Args:
            layers: of :func:`norm_layers`.
            source: their statistics on training images (:func:`fit_statistics`).
            prior: in frames.
            limit: in [0, 1]; 0 corrects nothing.
        """
        self.layers, self.source = layers, source
        self.prior, self.limit = prior, limit
        self._frames: dict[str, deque[Statistics]] = {name: deque() for name in layers}

    def clear(self) -> None:
        """Forgets all frames."""
        for frames in self._frames.values():
            frames.clear()

    def take(self, measured: Mapping[str, Statistics], size: int | None) -> None:
        """Adds a frame; at most ``size`` are kept, without a limit if it is None."""
        for name, statistics in measured.items():
            frames = self._frames[name]
            frames.append(statistics)
            while size is not None and len(frames) > size:
                frames.popleft()

    @contextmanager
    def correcting(self, size: int | None) -> Iterator[Measured]:
        """Corrects the layers in the forward pass within, for the window with its frame.

        Yields what it measures, for :meth:`take`. A layer that runs several times has the
        statistics of its last call.
        """
        measured: Measured = {}
        if not self.limit:
            yield measured
            return

        def correct(name: str, layer: nn.Module, x: Tensor) -> Tensor:
            plain, axis = _standardised(layer, x)
            others = [i for i in range(x.ndim) if i != axis]
            variance, mean = torch.var_mean(plain.float(), others, correction=0)
            measured[name] = Statistics(mean, variance)
            earlier = [*self._frames[name]]
            kept = earlier if size is None else earlier[max(len(earlier) - size + 1, 0) :]
            return self._corrected(name, layer, plain, axis, [*kept, measured[name]])

        with hooked(self.layers, correct):
            yield measured

    def _corrected(
        self, name: str, layer: Any, plain: Tensor, axis: int, frames: list[Statistics]
    ) -> Tensor:
        """Returns the layer's output with corrected statistics."""
        source, stream = self.source[name], Statistics.pooled(frames)
        share = self.limit * len(frames) / (self.prior + len(frames))
        mean = torch.lerp(source.mean, stream.mean, share)
        variance = torch.lerp(source.variance, stream.variance, share)
        if isinstance(layer, BATCH_NORMS):
            factor = layer.weight / (variance + layer.eps).sqrt()
            shift = layer.bias - mean * factor
        else:
            ratio = ((source.variance + 1e-5) / (variance + 1e-5)).sqrt()
            factor = layer.weight * ratio
            shift = layer.bias + layer.weight * (source.mean - mean * ratio)
        shape = [-1 if i == axis else 1 for i in range(plain.ndim)]
        return torch.addcmul(shift.view(shape), plain, factor.view(shape))

    def state_dict(self) -> dict[str, Any]:
        """Returns the statistics of the frames."""
        return {name: [tuple(s) for s in frames] for name, frames in self._frames.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Holds the frames of a state of :meth:`state_dict`, and no others."""
        self.clear()
        for name, frames in state.items():
            device = self.source[name].mean.device
            self._frames[name].extend(Statistics(*(t.to(device) for t in s)) for s in frames)


def _standardised(layer: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Returns what a layer's scale and shift, or running statistics, apply to; and its axis."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps), x.ndim - 1
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, eps=layer.eps), 1
    return x, 1
