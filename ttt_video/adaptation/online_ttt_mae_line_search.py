"""Online TTT-MAE with a line search, which decides how far a prediction follows the weights.

It is not in the paper. Masked reconstruction decides which way the weights move, as in
:mod:`.online_ttt_mae`; layers of the main task decide how far along that line a prediction goes.
With source weights w0 and adapted weights w_t, a prediction uses

    w0 + a (w_t - w0),    a = argmin over a few scales of  mean_c |m_c(a) - mu_c| / sigma_c,

where m_c(a) is the mean of channel c of the head's normalisation layers on the current frame, and
mu_c, sigma_c are its mean and deviation on training images. Scale 0 is the frozen model: it is
chosen if the adaptation leads the head away from what it knows. A scale above 1 goes further in a
direction that leads back to it. The weights themselves move as if there were no search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UserError
from .base import ADAPTER_REGISTRY
from .norm_statistics import Statistics, fit_statistics, measuring, norm_layers, read_statistics
from .online_ttt_mae import ReconstructionAdapter
from .window import SlidingWindow

SEARCHED = ("h",)
"""The weights of h never move, so that only f can shift its activations."""


class LineSearchAdapter(ReconstructionAdapter):
    """Takes :class:`ReconstructionAdapter`'s steps and predicts somewhere along the line."""

    def __init__(
        self,
        model: nn.Module,
        *,
        source: Mapping[str, Tensor],
        scales: Sequence[float],
        every: int = 5,
        decay: float = 0.5,
        **settings: Any,
    ) -> None:
        """``settings`` are :class:`ReconstructionAdapter`'s.

        Args:
            model: with its source weights.
            source: of :func:`measure_statistics`.
            scales: that a search tries, at least one, none negative.
            every: updates from one search to the next; a search costs a prediction per scale.
            decay: weight, in [0, 1), of the earlier searches of a video in the average of shifts
                whose minimum is sought.
        """
        super().__init__(model, **settings)
        self.scales = tuple(scales)
        self.every = every
        self.decay = decay
        self._layers = norm_layers(model, SEARCHED)
        if not self._layers:
            raise UserError(
                "the head has no normalisation layers, which a search compares: choose another "
                "--method"
            )
        self._statistics = fit_statistics(self._layers, source)
        self._forget()

    def _forget(self) -> None:
        self._scale = 1.0
        self._shifts: list[float] = []
        self._updates = 0

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Updates the weights, and searches on the current frame at every so many updates.

        Returns:
            :meth:`GradientAdapter.adapt`'s record, ``scale``, and ``norm_shift``: the mean distance
            of the head's channel means from the source's there, in the source's standard
            deviations, averaged over the searches.
        """
        record = super().adapt(window, generator)
        if self._updates % self.every == 0:
            self._search(window.current)
        self._updates += 1
        return {**record, "scale": self._scale, "norm_shift": self._shifts[self._best()]}

    def _search(self, frame: Any) -> None:
        found = torch.stack([self._shift_at(scale, frame) for scale in self.scales]).tolist()
        # A shift that is not finite is never the smallest, and is not averaged into later ones.
        found = [value if math.isfinite(value) else math.inf for value in found]
        before = self._shifts or found
        self._shifts = [
            self.decay * old + (1 - self.decay) * new if math.isfinite(old) else new
            for old, new in zip(before, found, strict=True)
        ]
        self._scale = self.scales[self._best()]

    def _best(self) -> int:
        return min(range(len(self.scales)), key=self._shifts.__getitem__)

    def _shift_at(self, scale: float, frame: Any) -> Tensor:
        with measuring(self._layers) as seen:
            self._predict_at(scale, frame)
        # Some layers run several times in a prediction, on training images, too.
        shifts = [
            Statistics.pooled(parts).shift_from(self._statistics[name])
            for name, parts in seen.items()
            if parts
        ]
        return torch.cat(shifts).mean()

    def _predict_at(self, scale: float, frame: Any) -> dict[str, Any]:
        with self.predicting():
            source = [self._source[name] for name in self._moving]
            weights = torch._foreach_lerp(source, [*self._moving.values()], scale)
            named = dict(zip(self._moving, weights, strict=True))
            return functional_call(self.model, named, ([frame],))[0]

    def predict(self, frame: Any) -> dict[str, Any]:
        """Returns detectron2's outputs for one frame, with the weights at the scale found last."""
        return super().predict(frame) if self._scale == 1 else self._predict_at(self._scale, frame)

    def reset(self) -> None:
        """Returns to the source weights; searches begin anew."""
        super().reset()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Returns :meth:`GradientAdapter.state_dict`'s entries, and ``search``."""
        search = {"scale": self._scale, "shifts": [*self._shifts], "updates": self._updates}
        return {**super().state_dict(), "search": search}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Adapter.load_state_dict`."""
        super().load_state_dict(state)
        search = state["search"]
        self._scale, self._updates = search["scale"], search["updates"]
        self._shifts = [*search["shifts"]]


@ADAPTER_REGISTRY.register()
def online_ttt_mae_line_search(cfg: CfgNode, model: nn.Module) -> LineSearchAdapter:
    """Builds ``--method online_ttt_mae_line_search``."""
    settings = cfg.TTT.LINE_SEARCH
    return LineSearchAdapter.from_config(
        cfg,
        model,
        source=read_statistics(cfg, model, norm_layers(model, SEARCHED)),
        scales=tuple(settings.SCALES),
        every=settings.EVERY,
        decay=settings.DECAY,
    )
