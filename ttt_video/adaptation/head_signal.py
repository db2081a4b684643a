"""Reads how far the head's activations are from those on training images, in passing.

The means of the channels of the head's normalisation layers are taken in a prediction that is made
anyway. They cost one mean per layer: no second forward pass, and the layers' outputs stay the same
bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .norm_statistics import BATCH_NORMS, Statistics

SMALL = 1e-3
"""Channels whose scale is smaller than that say nothing: they are left out."""


class Reading:
    """The signal of one forward pass."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}
        """Standardised channel means by layer, one entry for each call of the layer."""

    def vector(self) -> Tensor | None:
        """Returns (C,) float32: by how many standard deviations of the source each channel's mean
        is off; None if no layer ran.
        """
        means = [torch.stack(calls).mean(0) for calls in self.parts.values() if calls]
        return torch.cat(means) if means else None


class HeadSignal:
    """Measures channel means of normalisation layers that never move."""

    def __init__(self, layers: Mapping[str, nn.Module], source: Mapping[str, Statistics]) -> None:
        """
        Args:
            layers: of :func:`norm_layers`.
            source: their statistics on training images (:func:`fit_statistics`).
        """
        self.layers = layers
        self._source = {}
        for name, layer in layers.items():
            mean, scale = source[name].mean, (source[name].variance + 1e-5).sqrt()
            if isinstance(layer, BATCH_NORMS):  # its statistics are those of its input
                self._source[name] = (mean, 1 / scale)
                continue
            weight: Tensor = layer.weight.detach()  # type: ignore[operator]
            bias: Tensor = layer.bias.detach()  # type: ignore[operator]
            factor = torch.where(weight.abs() > SMALL, 1 / (weight * scale), 0.0)
            self._source[name] = (bias + weight * mean, factor)

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Collects the signal of the forward pass within."""
        reading = Reading()
        reading.parts = {name: [] for name in self.layers}
        handles = []
        for name, layer in self.layers.items():

            def hook(layer: nn.Module, x: tuple, out: Tensor, name: str = name) -> None:
                seen = x[0] if isinstance(layer, BATCH_NORMS) else out
                axis = seen.ndim - 1 if isinstance(layer, nn.LayerNorm) else 1
                others = [i for i in range(seen.ndim) if i != axis]
                centre, factor = self._source[name]
                mean = seen.mean(others, dtype=torch.float32)
                reading.parts[name].append((mean - centre) * factor)

            handles.append(layer.register_forward_hook(hook))
        try:
            yield reading
        finally:
            for handle in handles:
                handle.remove()
