"""Ensembles: adapters that predict several times with what another method has adapted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ..errors import UserError
from .base import Adapter, find_method
from .window import SlidingWindow

ENSEMBLES = ("majority_vote", "temporal_smoothing")


class EnsembleAdapter(Adapter):
    """Adapts and resets as the wrapped method does; a subclass defines :meth:`predict`."""

    def __init__(self, inner: Adapter) -> None:
        """``inner`` owns the model and all that moves."""
        super().__init__(inner.model)
        self.inner = inner
        self.offline = inner.offline
        self.updates = inner.updates

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """The wrapped method's update and its record."""
        return self.inner.adapt(window, generator)

    def watch(self, video: Iterable[Any], generator: torch.Generator) -> None:
        """Shows the wrapped method the whole video."""
        self.inner.watch(video, generator)

    def reset(self) -> None:
        """The wrapped method's reset."""
        self.inner.reset()

    def reset_weights(self) -> None:
        """The wrapped method's reset; predictions that are remembered stay."""
        self.inner.reset_weights()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped method's state under ``inner``."""
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave."""
        self.inner.load_state_dict(state["inner"])


def wrapped_method(cfg: CfgNode, model: nn.Module) -> Adapter:
    """The adapter that ``TTT.ENSEMBLE.METHOD`` names.

    Raises:
        UserError: it names an ensemble or nothing known, or the model does more than semantic
            segmentation: instances of different predictions have no common names to vote on.
    """
    name = cfg.TTT.ENSEMBLE.METHOD
    if name in ENSEMBLES:
        raise UserError(
            f"TTT.ENSEMBLE.METHOD is {name!r}, itself an ensemble; name the method under it, "
            "such as none or online_ttt_mae"
        )
    for output, task in (("instances", "instance"), ("panoptic_seg", "panoptic")):
        if output in getattr(model, "outputs", ()):
            raise UserError(
                f"{cfg.TTT.METHOD} combines class scores of pixels, which {task} segmentation "
                f"does not have; it needs a model with MODEL.MASK_FORMER.TEST.{task.upper()}_ON "
                "False"
            )
    return find_method(name)(cfg, model)
