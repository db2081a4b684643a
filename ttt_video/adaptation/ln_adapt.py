"""LN Adapt re-estimates statistics of normalisation layers on the stream (paper, Appendix A.2).

Batch normalisation standardises each channel with statistics of the training set, which Schneider
et al. (2020) replace by those of the test data. Layer and group normalisation have no such
statistics, but the layers after them expect a certain mean and variance of each channel, too. So
each channel of a layer's normalised activations z gets back the ones it had on training images:

    z' = (z - m) sigma_s / sigma + mu_s

where mu_s, sigma_s**2 are the source's and, with n frames in the window and Schneider's prior N,

    m = (N mu_s + n mu_t) / (N + n),    sigma**2 = (N sigma_s**2 + n sigma_t**2) / (N + n).

For batch normalisation m and sigma**2 simply replace the running statistics; for the others the
layer's scale and shift absorb the change. No prediction costs more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..config import AUTO
from ..errors import UserError
from ..modeling.interface import AdaptableModel, full_names, is_within
from .base import ADAPTER_REGISTRY, CPU, Adapter, module_mode
from .norm_statistics import (
    BATCH_NORMS,
    Statistics,
    channel_statistics,
    fit_statistics,
    hooked,
    norm_layers,
    read_statistics,
)
from .precision import tf32
from .window import SlidingWindow


class NormAdapter(Adapter):
    """Brings the channels of f's normalisation layers back to the source's mean and variance.

    One forward pass measures the current frame. It adapts each layer on its way, so that the layers
    after it see what they will see in the prediction.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: Mapping[str, Tensor],
        prior: float,
        modules: Sequence[str] = ("f",),
        shared: bool = False,
        precision: str = "fp32",
    ) -> None:
        """
        Args:
            model: with its source weights.
            source: of :func:`measure_statistics`; batch normalisations hold their own.
            prior: N, in frames; with infinity nothing changes.
            modules: whose layers are adapted.
            shared: whether scales and shifts also move otherwise, between two frames.
            precision: "tf32" lets a GPU measure in TF32; any other measures in exact float32.

        Raises:
            UserError: there are no layers, or ``source`` does not fit this model.
        """
        super().__init__(model)
        self.prior = prior
        self.shared = shared
        self.precision = precision
        self.layers = norm_layers(model, modules)
        encoder = full_names(model, "f")
        names = [full for name in modules for full in full_names(model, name)]
        self.encoder_only = hasattr(model, "encode")  # other architectures cannot run f alone
        self.encoder_only &= all(is_within(name, encoder) for name in names)
        if not self.layers:
            raise UserError(f"nothing to adapt: no normalisation layers under {list(modules)}")
        self._frames: dict[str, deque[Statistics]] = {name: deque() for name in self.layers}
        self._source = fit_statistics(self.layers, source)
        self._folded: dict[str, tuple[Tensor, Tensor]] = {}
        self._affine = {
            name: [t.detach().clone() for t in self._moving(layer)]
            for name, layer in self.layers.items()
        }

    @staticmethod
    def _moving(layer: nn.Module) -> tuple[Tensor, Tensor]:
        if isinstance(layer, BATCH_NORMS):
            return layer.running_mean, layer.running_var  # type: ignore[return-value]
        return layer.weight, layer.bias  # type: ignore[return-value]

    @torch.no_grad()
    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Measures the current frame and adapts to the last frames, as many as the window's size.

        Returns:
            ``norm_shift``: the mean over all channels of how far the window's channel means are
            from the source's, in standard deviations of the source.
        """
        shifts: list[Tensor] = []
        hook = partial(self._adapt_layer, size=window.size, shifts=shifts)
        device = torch.device(getattr(self.model, "device", CPU))
        multiplying = tf32(device, allowed=self.precision == "tf32")
        with multiplying, module_mode(self.model, training=False), hooked(self.layers, hook):
            if self.encoder_only:
                model = cast(AdaptableModel, self.model)
                model.encode(model.normalize([window.current]).tensor)
            else:
                self.model([window.current])
        return {"norm_shift": torch.cat(shifts).mean().item()}

    def _adapt_layer(
        self,
        name: str,
        layer: nn.Module,
        x: Tensor,
        _: Tensor,
        *,
        size: int | None,
        shifts: list[Tensor],
    ) -> Tensor:
        frames = self._frames[name]
        frames.append(channel_statistics(layer, x))
        while size is not None and len(frames) > size:
            frames.popleft()
        target = self._fold(name, layer)
        shifts.append(target.shift_from(self._source[name]))
        return layer.forward(x)  # with the statistics as they are now

    def _fold(self, name: str, layer: nn.Module) -> Statistics:
        """Puts the statistics of a layer's frames into its scale and shift, or running ones."""
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
            weight, bias = self._unfolded(name, first, second)
            ratio = ((source.variance + 1e-5) / (variance + 1e-5)).sqrt()
            shift = source.mean - mean * ratio
            first.copy_(weight * ratio)
            second.copy_(bias + weight * shift)
            self._folded[name] = ratio, shift
        return target

    def _unfolded(self, name: str, scale: Tensor, shift: Tensor) -> Sequence[Tensor]:
        """Returns a layer's own scale and shift, without the statistics that were folded in."""
        if not self.shared:
            return self._affine[name]
        if name not in self._folded:
            return scale.clone(), shift
        ratio, offset = self._folded[name]
        weight = scale / ratio
        return weight, shift - weight * offset

    @torch.no_grad()
    def reset(self) -> None:
        """Returns to the source's scales, shifts and running statistics, and forgets all frames."""
        for name, layer in self.layers.items():
            self._frames[name].clear()
            self._folded.pop(name, None)
            for tensor, source in zip(self._moving(layer), self._affine[name], strict=True):
                tensor.copy_(source)

    def state_dict(self) -> dict[str, Any]:
        """Returns the statistics of the window's frames, from which everything else follows."""
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


def check_window(cfg: CfgNode) -> None:
    """Refuses ``TTT.WINDOW_SIZE auto`` for statistics, which are pooled over a number of frames."""
    if cfg.TTT.WINDOW_SIZE == AUTO:
        raise UserError(
            f"TTT.WINDOW_SIZE is {AUTO!r}, which goes by gradients, and statistics have none: give "
            "a number of frames"
        )


def norm_adapter(cfg: CfgNode, model: nn.Module, *, shared: bool = False) -> NormAdapter:
    """Builds the adapter of ``TTT.LN_ADAPT.*`` and ``TTT.MODULES``; see :class:`NormAdapter`.

    Raises:
        UserError: the window is to be chosen, or the statistics are missing or of another model.
    """
    check_window(cfg)
    modules = tuple(cfg.TTT.MODULES) or ("f",)
    source = read_statistics(cfg, model, norm_layers(model, modules))
    settings: dict[str, Any] = {"prior": cfg.TTT.LN_ADAPT.PRIOR, "precision": cfg.TTT.PRECISION}
    return NormAdapter(model, source=source, modules=modules, shared=shared, **settings)


@ADAPTER_REGISTRY.register()
def ln_adapt(cfg: CfgNode, model: nn.Module) -> NormAdapter:
    """Builds ``--method ln_adapt``, which has no gradient and no learning rate."""
    model.requires_grad_(False)
    return norm_adapter(cfg, model)
