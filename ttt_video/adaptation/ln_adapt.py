"""LN Adapt: statistics of normalisation layers re-estimated on the stream (paper, Appendix A.2).

Batch normalisation standardises each channel with statistics of the training set, which Schneider
et al. (2020) replace by those of the test data. Layer and group normalisation have no such
statistics, but the layers after them are used to a mean and a variance of each channel all the
same. So each channel of a layer's normalised activations z is brought back to those it had on the
training images:

    z' = (z - m) sigma_s / sigma + mu_s

where mu_s, sigma_s**2 are the source's and, with n frames in the window and Schneider's prior N,

    m = (N mu_s + n mu_t) / (N + n),    sigma**2 = (N sigma_s**2 + n sigma_t**2) / (N + n).

For batch normalisation this is the same as putting m and sigma**2 in the place of the running
statistics; for the others the layer's scale and shift absorb it. No prediction costs more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from ..errors import UserError
from ..modeling.weights import read_checkpoint
from .base import ADAPTER_REGISTRY, Adapter, module_mode, require_keys
from .window import SlidingWindow

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


class Statistics(NamedTuple):
    """Mean and variance of each channel, (C,) float32."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def pooled(cls, parts: Sequence[Statistics]) -> Statistics:
        """Of several images together, each of the same weight."""
        means = torch.stack([part.mean for part in parts])
        variances = torch.stack([part.variance for part in parts])
        return cls(means.mean(0), variances.mean(0) + means.var(0, correction=0))


def norm_layers(model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Module]:
    """Layer, group and batch normalisations with a scale and shift, within the named modules."""
    kinds = (nn.LayerNorm, nn.GroupNorm, *BATCH_NORMS)
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, kinds)
        and getattr(layer, "weight", None) is not None
        and any(name == module or name.startswith(f"{module}.") for module in modules)
    }


def channel_statistics(layer: nn.Module, x: Tensor) -> Statistics:
    """Of the activations that the layer's scale and shift are applied to.

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
    layers: Mapping[str, nn.Module], hook: Callable[[str, nn.Module, Tensor], Tensor | None]
) -> Iterator[None]:
    """``hook(name, layer, input)`` at every forward of the layers; a tensor replaces the output."""
    handles = [
        layer.register_forward_hook(lambda m, x, _, name=name: hook(name, m, x[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_statistics(
    model: Any, images: Iterable[Tensor], modules: Sequence[str] = ("backbone", "sem_seg_head")
) -> dict[str, Tensor]:
    """What a training set's images give, for ``TTT.LN_ADAPT.SOURCE_STATISTICS``.

    Args:
        model: with its source weights.
        images: (3, H, W) uint8, as a stream's.
        modules: whose layers are measured.

    Returns:
        ``<layer>.mean`` and ``<layer>.variance`` of each layer and group normalisation.
    """
    layers = norm_layers(model, modules)
    seen: dict[str, list[Statistics]] = {name: [] for name in layers}

    def measure(name: str, layer: nn.Module, x: Tensor) -> None:
        seen[name].append(channel_statistics(layer, x))

    with module_mode(model, training=False), hooked(layers, measure):
        for image in images:
            model([{"image": image}])
    pooled = {name: Statistics.pooled(parts) for name, parts in seen.items() if parts}
    result: dict[str, Tensor] = {}
    for name, statistics in pooled.items():
        if not isinstance(layers[name], BATCH_NORMS):  # those hold their own
            result[f"{name}.mean"] = statistics.mean.cpu()
            result[f"{name}.variance"] = statistics.variance.cpu()
    return result


class NormAdapter(Adapter):
    """Brings the channels of f's normalisation layers back to the source's mean and variance.

    One forward pass measures the current frame once it is revealed; each layer is adapted as the
    pass reaches it, so that the layers after it see what they will see in the prediction.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: Mapping[str, Tensor],
        prior: float,
        modules: Sequence[str] = ("backbone",),
    ) -> None:
        """
        Args:
            model: with its source weights.
            source: of :func:`measure_statistics`; batch normalisations bring their own.
            prior: N, in frames; infinite leaves the model as it is.
            modules: whose layers are adapted.

        Raises:
            UserError: there are no layers, or ``source`` is not of this model.
        """
        super().__init__(model)
        model.requires_grad_(False)
        self.prior = prior
        self.layers = norm_layers(model, modules)
        # Other architectures have no pass of f alone.
        self.encoder_only = hasattr(model, "encode") and all(
            name.split(".")[0] == "backbone" for name in modules
        )
        if not self.layers:
            raise UserError(f"nothing to adapt: no normalisation layers under {list(modules)}")
        self._frames: dict[str, deque[Statistics]] = {name: deque() for name in self.layers}
        self._affine: dict[str, list[Tensor]] = {}
        self._source: dict[str, Statistics] = {}
        for name, layer in self.layers.items():
            self._affine[name] = [t.detach().clone() for t in self._moving(layer)]
            self._source[name] = self._source_of(name, layer, source)

    @staticmethod
    def _moving(layer: nn.Module) -> tuple[Tensor, Tensor]:
        if isinstance(layer, BATCH_NORMS):
            return layer.running_mean, layer.running_var  # type: ignore[return-value]
        return layer.weight, layer.bias  # type: ignore[return-value]

    def _source_of(self, name: str, layer: nn.Module, source: Mapping[str, Tensor]) -> Statistics:
        scale = self._affine[name][0]
        if isinstance(layer, BATCH_NORMS):
            return Statistics(*(t.float() for t in self._affine[name]))
        found = [source.get(f"{name}.{kind}") for kind in Statistics._fields]
        if any(t is None or t.shape != scale.shape for t in found):
            raise UserError(
                f"TTT.LN_ADAPT.SOURCE_STATISTICS has nothing that fits layer {name}: measure it "
                "with this model by tools/measure_norm_statistics.py"
            )
        return Statistics(*(t.to(scale.device, torch.float32) for t in found if t is not None))

    @torch.no_grad()
    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Measures the current frame and adapts to the last ones measured, as many as a window has.

        Returns:
            ``norm_shift``: how far the window's channel means are from the source's, in standard
            deviations of the source; the mean over all channels.
        """
        shifts: list[Tensor] = []
        hook = partial(self._adapt_layer, size=window.size, shifts=shifts)
        with module_mode(self.model, training=False), hooked(self.layers, hook):
            if self.encoder_only:
                images = self.model.normalize([window.current])  # type: ignore[operator]
                self.model.encode(images.tensor)  # type: ignore[operator]
            else:
                self.model([window.current])
        return {"norm_shift": torch.cat(shifts).mean().item()}

    def _adapt_layer(
        self, name: str, layer: nn.Module, x: Tensor, *, size: int | None, shifts: list[Tensor]
    ) -> Tensor:
        frames = self._frames[name]
        frames.append(channel_statistics(layer, x))
        while size is not None and len(frames) > size:
            frames.popleft()
        target = self._fold(name, layer)
        source = self._source[name]
        shifts.append((target.mean - source.mean).abs() / (source.variance + 1e-5).sqrt())
        return layer.forward(x)  # with the statistics as they are now

    def _fold(self, name: str, layer: nn.Module) -> Statistics:
        """Writes what the layer's frames say into its scale and shift, or running statistics."""
        source, target = self._source[name], Statistics.pooled(self._frames[name])
        count = len(self._frames[name])
        share = count / (self.prior + count)
        mean = (1 - share) * source.mean + share * target.mean
        variance = (1 - share) * source.variance + share * target.variance
        first, second = self._moving(layer)
        if isinstance(layer, BATCH_NORMS):
            first.copy_(mean)
            second.copy_(variance)
        else:
            weight, bias = self._affine[name]
            ratio = ((source.variance + 1e-5) / (variance + 1e-5)).sqrt()
            first.copy_(weight * ratio)
            second.copy_(bias + weight * (source.mean - mean * ratio))
        return target

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the source's scales, shifts and running statistics; no frame is remembered."""
        for name, layer in self.layers.items():
            self._frames[name].clear()
            for tensor, source in zip(self._moving(layer), self._affine[name], strict=True):
                tensor.copy_(source)

    def state_dict(self) -> dict[str, Any]:
        """The statistics of the window's frames, of which all else follows."""
        frames = {name: [tuple(s) for s in parts] for name, parts in self._frames.items()}
        return {"frames": frames}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Adapter.load_state_dict`."""
        self.reset()
        for name, layer in self.layers.items():
            device = self._affine[name][0].device
            parts = [Statistics(*(t.to(device) for t in s)) for s in state["frames"][name]]
            self._frames[name].extend(parts)
            if parts:
                self._fold(name, layer)


@ADAPTER_REGISTRY.register()
def ln_adapt(cfg: CfgNode, model: nn.Module) -> NormAdapter:
    """``--method ln_adapt``: no gradient, no learning rate."""
    require_keys(cfg, "ln_adapt", RESET="video")
    modules = tuple(cfg.TTT.MODULES) or ("backbone",)
    file = cfg.TTT.LN_ADAPT.SOURCE_STATISTICS
    layers = norm_layers(model, modules).values()
    if not file and not all(isinstance(layer, BATCH_NORMS) for layer in layers):
        raise UserError(
            "TTT.LN_ADAPT.SOURCE_STATISTICS is empty: layer norms hold no statistics of the "
            "training images; measure them once with tools/measure_norm_statistics.py"
        )
    source = read_checkpoint(file) if file else {}
    return NormAdapter(model, source=source, prior=cfg.TTT.LN_ADAPT.PRIOR, modules=modules)
