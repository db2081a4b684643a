"""Measures the mean and variance of each channel of a model's normalisation layers.

Measured once on training images, they tell how far the activations of a stream are from those that
the layers after them expect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from ..errors import UserError
from ..modeling.interface import full_names, is_within
from ..modeling.measured import read_measured
from .base import CPU, module_mode
from .precision import tf32

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


class Statistics(NamedTuple):
    """Mean and variance of each channel, (C,) float32."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def pooled(cls, parts: Sequence[Statistics]) -> Statistics:
        """Pools the statistics of several images with equal weights."""
        means = torch.stack([part.mean for part in parts])
        variances = torch.stack([part.variance for part in parts])
        return cls(means.mean(0), variances.mean(0) + means.var(0, correction=0))

    def shift_from(self, source: Statistics) -> Tensor:
        """Returns (C,) distances of the means, in standard deviations of ``source``."""
        return (self.mean - source.mean).abs() / (source.variance + 1e-5).sqrt()


def norm_layers(model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Module]:
    """Returns the layer, group and batch normalisations that have a scale and shift, by name.

    Args:
        model: that has them.
        modules: submodules to look in, by their names or with a role ("f", "f.layers.3").
    """
    within = [full for module in modules for full in full_names(model, module)]
    kinds = (nn.LayerNorm, nn.GroupNorm, *BATCH_NORMS)
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, kinds)
        and getattr(layer, "weight", None) is not None
        and is_within(name, within)
    }


def channel_statistics(layer: nn.Module, x: Tensor) -> Statistics:
    """Measures the activations that the layer's scale and shift are applied to.

    Args:
        layer: one of :func:`norm_layers`.
        x: its input; channels are the last axis for layer normalisation, else the second.
    """
    x = x.float()
    axis = 1
    if isinstance(layer, nn.LayerNorm):
        x, axis = F.layer_norm(x, layer.normalized_shape, eps=layer.eps), -1
    elif isinstance(layer, nn.GroupNorm):
        x = F.group_norm(x, layer.num_groups, eps=layer.eps)
    by_channel = x.movedim(axis, 0).flatten(1)
    return Statistics(by_channel.mean(1), by_channel.var(1, correction=0))


@contextmanager
def hooked(
    layers: Mapping[str, nn.Module], hook: Callable[[str, nn.Module, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Calls ``hook(name, layer, input, output)`` at every forward pass of a layer.

    A tensor that the hook returns replaces the layer's output.
    """
    handles = [
        layer.register_forward_hook(lambda m, x, out, name=name: hook(name, m, x[0], out))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def measuring(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Statistics]]]:
    """Collects the statistics of each layer, one entry for each of its forward passes."""
    seen: dict[str, list[Statistics]] = {name: [] for name in layers}

    def measure(name: str, layer: nn.Module, x: Tensor, _: Tensor) -> None:
        seen[name].append(channel_statistics(layer, x))

    with hooked(layers, measure):
        yield seen


@torch.no_grad()
def measure_statistics(
    model: Any, images: Iterable[Tensor], modules: Sequence[str] = ("f", "h")
) -> dict[str, Tensor]:
    """Measures the images of a training set, for ``TTT.LN_ADAPT.SOURCE_STATISTICS``.

    It is done in float32 without TF32, whatever the process has set.

    Args:
        model: with its source weights.
        images: (3, H, W) uint8, as a stream's.
        modules: whose layers are measured.

    Returns:
        ``<layer>.mean`` and ``<layer>.variance`` of each layer and group normalisation; batch
        normalisations hold their own.
    """
    found = norm_layers(model, modules).items()
    layers = {name: layer for name, layer in found if not isinstance(layer, BATCH_NORMS)}
    exact = tf32(torch.device(getattr(model, "device", CPU)), allowed=False)
    with exact, module_mode(model, training=False), measuring(layers) as seen:
        for image in images:
            model([{"image": image}])
    return {
        f"{name}.{kind}": values.cpu()
        for name, parts in seen.items()
        if parts
        for kind, values in Statistics.pooled(parts)._asdict().items()
    }


def read_statistics(
    cfg: CfgNode, model: nn.Module, layers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Reads the file that ``TTT.LN_ADAPT.SOURCE_STATISTICS`` names; batch normalisations need none.

    Raises:
        UserError: the key is empty, and some layer is not a batch normalisation.
    """
    file = cfg.TTT.LN_ADAPT.SOURCE_STATISTICS
    if file:
        return read_measured(file).checked(model)
    if all(isinstance(layer, BATCH_NORMS) for layer in layers.values()):
        return {}
    raise UserError(
        "TTT.LN_ADAPT.SOURCE_STATISTICS is empty: layer norms hold no statistics of the "
        "training images; measure them once with tools/measure_norm_statistics.py"
    )


def fit_statistics(
    layers: Mapping[str, nn.Module], measured: Mapping[str, Tensor]
) -> dict[str, Statistics]:
    """Returns each layer's statistics of the training images.

    Args:
        layers: of :func:`norm_layers`.
        measured: of :func:`measure_statistics`; batch normalisations hold their own.

    Raises:
        UserError: ``measured`` has nothing that fits one of the layers.
    """
    fitted = {}
    for name, layer in layers.items():
        scale: Tensor = layer.weight  # type: ignore[assignment]
        if isinstance(layer, BATCH_NORMS):
            own: list[Any] = [layer.running_mean, layer.running_var]
        else:
            own = [measured.get(f"{name}.{kind}") for kind in Statistics._fields]
        if any(t is None or t.shape != scale.shape for t in own):
            raise UserError(
                f"TTT.LN_ADAPT.SOURCE_STATISTICS has nothing that fits layer {name}: measure it "
                "with this model by tools/measure_norm_statistics.py"
            )
        fitted[name] = Statistics(*(t.to(scale.device, torch.float32, copy=True) for t in own))
    return fitted
