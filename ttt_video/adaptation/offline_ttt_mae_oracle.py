"""Offline TTT-MAE stopped at its best step by the video's labels (paper, Section 6.1, Table 1).

It is the only method that sees labels, and uses them only to choose among weights that were trained
without them: the paper grants this advantage to its offline row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..errors import UserError
from ..tasks import build_tasks, sign
from .base import ADAPTER_REGISTRY, Adapter
from .offline_ttt_mae import OfflineReconstructionAdapter

Score = Callable[[list[Any], Callable[[Any], dict[str, Any]]], float]
"""Scores labelled frames, given what predicts them; higher is better, NaN is undefined."""


class OfflineOracleAdapter(OfflineReconstructionAdapter):
    """Trains as offline TTT-MAE and keeps, of the weights of every so many steps, the best."""

    def __init__(
        self,
        model: nn.Module,
        *,
        score: Score,
        eval_every: int,
        allow_zero: bool = False,
        **settings: Any,
    ) -> None:
        """
        Args:
            model: with its source weights.
            score: says how good predictions are.
            eval_every: steps between two candidates; the last step is one, too.
            allow_zero: whether the source weights, step 0, are the first candidate.
            settings: :class:`OfflineReconstructionAdapter`'s.
        """
        super().__init__(model, **settings)
        self.score = score
        self.eval_every = eval_every
        self.allow_zero = allow_zero
        self._labelled: list[Any] = []
        self._best: tuple[float, int, dict[str, Tensor]] = (-math.inf, 0, {})

    @torch.no_grad()
    def watch(self, video: Iterable[Any], generator: torch.Generator) -> None:
        """Trains on the images of the video, then returns to the step that scored best."""
        # All are kept, so without their pictures, which may be far larger than the network's input.
        self._labelled = [
            {key: value for key, value in frame.items() if key != "picture"} for frame in video
        ]
        self._best = (-math.inf, 0, {})
        if self.allow_zero:
            self._consider(0)
        elif all(math.isnan(self._score([frame])) for frame in self._labelled):
            self._refuse()  # now, because the training may take hours
        with torch.enable_grad():
            super().watch(self._labelled, generator)
        value, step, weights = self._best
        for name, tensor in weights.items():
            self._state[name].copy_(tensor)
        assert self._record is not None
        self._record.update(offline_steps=step, offline_score=value)
        self._labelled, self._best = [], (-math.inf, 0, {})

    def after_step(self, step: int) -> None:
        """Scores the weights every so many steps."""
        if step % self.eval_every == 0 or step == self.num_steps:
            self._consider(step)

    def _score(self, frames: list[Any]) -> float:
        return self.score(frames, lambda frame: Adapter.predict(self, frame))

    def _refuse(self) -> NoReturn:
        raise UserError(
            f"video {self._labelled[0]['video_id']} has no labels that the model's predictions "
            "can be scored on, which offline_ttt_mae_oracle chooses its step by; "
            "offline_ttt_mae needs none"
        )

    @torch.no_grad()
    def _consider(self, step: int) -> None:
        value = self._score(self._labelled)
        if math.isnan(value):
            self._refuse()
        if value > self._best[0]:
            weights = {name: tensor.detach().clone() for name, tensor in self._state.items()}
            self._best = (value, step, weights)


def scorer(cfg: CfgNode) -> Score:
    """Returns a function that scores a whole video as the paper's Table 1 does, in percent.

    The metric is the headline of the task of the first of ``DATASETS.TEST``; without one, of the
    first task for which the video has labels and the model has outputs. It is negated if lower is
    better.
    """
    # Grey frames are their own labels, whatever a data set has.
    name = next(iter(cfg.DATASETS.TEST), None) if cfg.INPUT.GREY == "off" else None

    def score(frames: list[Any], predict: Callable[[Any], dict[str, Any]]) -> float:
        scored = [task for task in build_tasks(name) if task.headline]
        for frame in frames:
            output = predict(frame)
            for task in scored:
                task.process([frame], [output])
        for task in scored:
            number = task.evaluate().get(task.name, {}).get(task.headline)
            if number is not None and not math.isnan(number):
                return sign(task.headline) * number
        return math.nan

    return score


@ADAPTER_REGISTRY.register()
def offline_ttt_mae_oracle(cfg: CfgNode, model: nn.Module) -> OfflineOracleAdapter:
    """Builds ``--method offline_ttt_mae_oracle`` with the keys of ``TTT.OFFLINE``."""
    return OfflineOracleAdapter.from_config(
        cfg,
        model,
        num_steps=cfg.TTT.OFFLINE.STEPS,
        eval_every=cfg.TTT.OFFLINE.EVAL_EVERY,
        allow_zero=cfg.TTT.OFFLINE.ALLOW_ZERO,
        score=scorer(cfg),
    )
