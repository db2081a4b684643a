"""Offline TTT-MAE: one model per video, trained on all of its frames (paper, Section 6.1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn
from tqdm import tqdm

from .base import ADAPTER_REGISTRY
from .online_ttt_mae import ReconstructionAdapter
from .window import SlidingWindow


class OfflineReconstructionAdapter(ReconstructionAdapter):
    """Takes all gradient steps before the first prediction, on batches from the whole video.

    Until then all frames are kept in main memory. The number of steps is fixed.
    """

    offline = True

    def __init__(self, model: nn.Module, *, num_steps: int, **settings: Any) -> None:
        """``num_steps``: gradient steps; ``settings`` are :class:`ReconstructionAdapter`'s."""
        super().__init__(model, **settings)
        self.num_steps = num_steps
        self._record: dict[str, float] | None = None

    def watch(self, video: Iterable[Any], generator: torch.Generator) -> None:
        """Trains on the images of the video."""
        window = SlidingWindow(None)
        for frame in video:
            window.push(frame)
        record: dict[str, float] = {}
        skipped = 0
        for step in tqdm(range(1, self.num_steps + 1), desc="offline", unit="step", leave=False):
            record = self.take_steps(1, window, generator)
            skipped += int(record["skipped_steps"])
            self.after_step(step)
        self._mover.drop()  # it is not needed again
        self._record = {"offline_steps": self.num_steps, **record, "skipped_steps": skipped}

    def after_step(self, step: int) -> None:
        """Does nothing; called after each of the steps, counted from 1."""

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Changes nothing; returns the record of the training's last step."""
        return dict(self._trained())

    def predict(self, frame: Any) -> dict[str, Any]:
        """Returns the trained model's prediction."""
        self._trained()
        return super().predict(frame)

    def _trained(self) -> dict[str, float]:
        if self._record is None:
            raise RuntimeError("an offline method must watch the video before it predicts it")
        return self._record

    def reset(self) -> None:
        """Returns to the source weights, before the training."""
        super().reset()
        self._record = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the weights' state and the record of the training."""
        return {**super().state_dict(), "record": self._record}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Adapter.load_state_dict`."""
        super().load_state_dict(state)
        self._record = state["record"]


@ADAPTER_REGISTRY.register()
def offline_ttt_mae(cfg: CfgNode, model: nn.Module) -> OfflineReconstructionAdapter:
    """Builds ``--method offline_ttt_mae``: ``TTT.OFFLINE.STEPS`` steps, without any label."""
    return OfflineReconstructionAdapter.from_config(cfg, model, num_steps=cfg.TTT.OFFLINE.STEPS)
